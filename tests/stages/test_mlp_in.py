"""mlp_in: g = GELU(e¹ W₁ᵀ + b₁) with its row moments, and its backward."""

from __future__ import annotations

import importlib

import pytest
import torch
from stages.cases import Collected, Results, Run, Setup
from stages.checks import check_same_bits, check_stage, check_unaligned, stage
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.stages.common import RowMoments
from gcahng.engine.stages.mlp_in import (
    MlpInGradients,
    MlpInInputs,
    MlpInOutputs,
    MlpInUpstream,
    NormRows,
)
from gcahng.engine.weights import EdgeGradients
from gcahng.testing import assert_close_to_truth, seeded


@stage("rows", edges=False)
def forward(run: Run) -> Results:
    """h and the moments are stored where they are asked for."""
    found = Collected()
    for number, tile, rows in run.tiles():
        stored = RowMoments(run.nan(tile.rows, 1), run.nan(tile.rows, 1))
        h = run.nan(tile.rows, 4 * run.dim, dtype=run.low)
        room = (h, stored) if number else (None, None)
        g, moments = run.stages.edge_update.mlp_in.forward(run.inputs.weights, run.edges(rows), *room)
        if number:
            assert all(torch.equal(a, b) for a, b in zip(stored, moments, strict=True))
            assert h.isfinite().all()
        found.add(g=g, mean=moments.mean, rstd=moments.rstd)
    return found.results()


@stage("rows", edges=False)
def backward(run: Run) -> Results:
    """From the stored product, and from one that is formed again."""
    found, into, mlp_in = Collected(), EdgeGradients(run.dim, run.like), run.stages.edge_update.mlp_in
    w = run.inputs.weights
    for number, tile, rows in run.tiles():
        e1, ds = run.edges(rows), rows(run.inputs.upstream).to(run.low)
        h = run.nan(tile.rows, 4 * run.dim, dtype=run.low)
        moments = RowMoments(*(x.clone() for x in mlp_in.forward(w, e1, h, None)[1]))
        of_rows = NormRows(*moments, *(x.contiguous() for x in rows(run.inputs.means).split(1, dim=1)))
        g, dh = mlp_in.backward(w, e1, h, ds, of_rows, None)
        found.add(g=g, dh=dh)
        g, dh = mlp_in.backward(w, e1, None if number else h, ds, of_rows, into)
        found.add(g_again=g, dh_again=dh)
    return found.results() | {"b1": into.b1}


directions = pytest.mark.parametrize("direction", [forward, backward], ids=str)


@directions
def test_stage(backend, direction):
    check_stage(backend, direction)


@directions
def test_same_bits_twice(backend, direction):
    check_same_bits(backend, direction)


def moments_of(g: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and 1/σ of each row, in fp64."""
    variance, mean = torch.var_mean(g.double(), dim=1, correction=0, keepdim=True)
    return mean, (variance + 1e-5).rsqrt()


def outputs_for(h: Tensor) -> MlpInOutputs:
    mean, rstd = (torch.full((len(h), 1), torch.nan, device=h.device) for _ in range(2))
    return MlpInOutputs(torch.full_like(h, torch.nan), mean, rstd)


def test_hidden_values_as_they_are_stored(backend):
    """Row moments, and what the backward makes of them, are of g as the next product reads it; db is summed before dh
    is rounded."""
    rows, width, device = 40, 300, backend.device
    h, b = seeded(rows, width, seed=1).to(device, backend.low), seeded(width, seed=2).to(device)
    inputs, outputs = MlpInInputs(h, b), outputs_for(h)
    backend.ops.mlp_in_fwd_(inputs, outputs)
    mean, rstd = moments_of(outputs.g)
    torch.testing.assert_close(outputs.mean.double(), mean, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(outputs.rstd.double(), rstd, rtol=2e-6, atol=0)

    zero, one = torch.zeros(rows, 1, device=device), torch.ones(rows, 1, device=device)
    gradients = MlpInGradients(*(torch.full_like(h, torch.nan) for _ in range(2)), torch.zeros(width, device=device))
    backend.ops.mlp_in_bwd_(inputs, MlpInUpstream(torch.zeros_like(h)), NormRows(zero, one, zero, one), gradients)
    assert torch.equal(outputs.g, gradients.g)
    x = (h.double() + b.double()).requires_grad_()
    F.gelu(x).backward(-outputs.g.double())  # dn = -g
    torch.testing.assert_close(gradients.db.double(), x.grad.sum(dim=0), rtol=1e-5, atol=1e-5)


def test_long_sums(cpp):
    """They are formed in runs: their error grows as the root of what is summed, or it would be twice this."""
    width = 1 << 17
    h = seeded(2, width, seed=1).abs()
    outputs = outputs_for(h)
    cpp.ops.mlp_in_fwd_(MlpInInputs(h, torch.zeros(width)), outputs)
    for found, wanted in zip(outputs[1:], moments_of(outputs.g), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=5e-7, atol=0)


# -- Triton's products


@pytest.mark.simulated
@directions
def test_between_products_of_the_library(between_products, direction):
    check_stage(between_products, direction)


@pytest.mark.simulated
@directions
def test_several_blocks_of_rows_a_program(triton, direction, monkeypatch):
    """As where there are thousands of blocks."""
    kernels = importlib.import_module("gcahng.kernels.mlp_in")
    monkeypatch.setattr(kernels, "ROWS_BACKWARD", kernels.ROWS_BACKWARD._replace(programs=1))
    check_stage(triton, direction, [(Setup(6, 3, 19, 300), "float64")])


@pytest.mark.simulated
def test_more_blocks_than_share_a_cache():
    """Every block of a product is formed, in whichever order."""
    e1, w1, b = (seeded(*shape, seed=k) for k, shape in enumerate(((1300, 5), (300, 5), (300,))))
    h = torch.full((1300, 300), torch.nan)
    outputs = outputs_for(h)
    importlib.import_module("gcahng.kernels.mlp_in").product_forward(e1, w1, b, h, outputs)
    torch.testing.assert_close(h, e1 @ w1.T)
    torch.testing.assert_close(outputs.g, F.gelu(h + b))
    variance, wanted_mean = torch.var_mean(outputs.g, dim=1, correction=0, keepdim=True)
    torch.testing.assert_close(outputs.mean, wanted_mean)
    torch.testing.assert_close(outputs.rstd, torch.rsqrt(variance + 1e-5))


@pytest.mark.simulated
def test_hidden_values_are_made_of_the_product_as_it_is_stored():
    """The backward makes them of it again."""
    e1, w1, b = (seeded(*shape, seed=k) for k, shape in enumerate(((50, 33), (70, 33), (70,))))
    h = torch.full((50, 70), torch.nan, dtype=torch.float16)
    outputs = outputs_for(h)
    importlib.import_module("gcahng.kernels.mlp_in").product_forward(e1.half(), w1.half(), b, h, outputs)
    again = F.gelu(h.float() + b)
    large = again.abs() > 1e-2  # of the others, what is near 0 in the tail of GELU is formed less exactly
    assert (outputs.g != again.half())[large].float().mean() < 0.01  # two roundings of fp32 on both sides of a tie
    torch.testing.assert_close(outputs.mean, outputs.g.float().mean(dim=1, keepdim=True), rtol=2e-6, atol=2e-7)


# -- CUDA kernels, emulated


@pytest.mark.simulated
@directions
def test_unaligned(emulator, direction):
    check_unaligned(emulator, direction)


@pytest.mark.simulated
def test_blocks_that_take_several_rows(emulator):
    """Warps meet at barriers that several rows share: none may run ahead into places that others still read."""
    h = seeded(4110, 264, seed=1)
    outputs = outputs_for(h)
    emulator.ordered(0).mlp_in_fwd_(MlpInInputs(h, torch.zeros(264)), outputs)
    mean, rstd = moments_of(F.gelu(h.double()))
    torch.testing.assert_close(outputs.mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs.rstd.double(), rstd, rtol=1e-6, atol=0)


@pytest.mark.simulated
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)
def test_the_widest_rows(emulator, low):
    h, b = seeded(2, 4096, seed=4, dtype=low), seeded(4096, seed=5)
    outputs = outputs_for(h)
    emulator.mlp_in_fwd_(MlpInInputs(h, b), outputs)
    assert_close_to_truth(outputs.g, F.gelu(h.float() + b).to(low), F.gelu(h.double() + b))
    mean, rstd = moments_of(outputs.g)
    torch.testing.assert_close(outputs.mean.double(), mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(outputs.rstd.double(), rstd, rtol=1e-6, atol=0)


@pytest.mark.simulated
def test_wider_rows_are_an_error(emulator):
    h = torch.zeros(1, 4097)
    with pytest.raises(RuntimeError, match="cudaError_t 1"):
        emulator.mlp_in_fwd_(MlpInInputs(h, h[0].clone()), outputs_for(h))
