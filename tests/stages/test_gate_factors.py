"""What Triton's gate multiplies attention weights with is the reference's, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from stages.test_gate_masks import CHANCES, DRAWS, LAYERS, SEEDS

from gcahng.kernels.gate import dropout_arguments, factors
from gcahng.reference.philox import dropout_threshold, edge_masks

pytestmark = pytest.mark.simulated


@triton.jit
def factors_kernel(
    p_i,  # (n,)
    p_j,  # (n,)
    p_out,  # (2, n)
    p_draw,  # (1,)
    n,
    nodes,
    seed,
    layer,
    threshold,
    SCALE: tl.constexpr,
    TIED: tl.constexpr,
    DROP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.arange(0, BLOCK)
    i, j = tl.load(p_i + o, mask=o < n, other=0), tl.load(p_j + o, mask=o < n, other=0)
    b_i, b_j = factors(i, j, nodes, seed, layer, threshold, p_draw, SCALE, TIED, DROP, COMPUTE)
    tl.store(p_out + o, b_i, mask=o < n)
    tl.store(p_out + n + o, b_j, mask=o < n)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NODES = 1000


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors(tied, dtype):
    """0 or 1/(1-p), bit for bit: for seeds and draws of more than 31 bits, thresholds from none to nearly all, and
    places in a wrapped tensor past the last node."""
    i, j = torch.randint(NODES, (2, 300), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    j[:50] = i[:50]
    wrapped = torch.where(torch.arange(300, device=DEVICE) % 3 == 0, j + NODES, j)
    found = torch.full((2, 300), torch.nan, dtype=dtype, device=DEVICE)
    chances = (0.0, 1e-12, 2.0**-32, *CHANCES, 1 - 2.0**-32)
    for layer, seed, draw, p in itertools.product(LAYERS, SEEDS, DRAWS, chances):
        numbers, constants = dropout_arguments((seed, layer, dropout_threshold(p), int(tied)), 1 / (1 - p))
        draw = torch.tensor(draw, device=DEVICE)
        compute = tl.float64 if dtype == torch.float64 else tl.float32
        factors_kernel[(1,)](i, wrapped, found, draw, 300, NODES, *numbers, **constants, COMPUTE=compute, BLOCK=512)
        mask = edge_masks(i, j, layer=layer, draw=draw, seed=seed, p=p, symmetric=tied)
        assert torch.equal(found, (mask.double() / (1 - p)).to(dtype).T), (layer, seed, draw, p)
