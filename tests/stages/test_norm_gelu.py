"""norm_gelu: LayerNorm(GELU(·)) of stored sums. Its backward is part of gate's and mlp_out's."""

from __future__ import annotations

import pytest
import torch
from stages.cases import Collected, Results, Run
from stages.checks import check_outputs_on_their_own, check_same_bits, check_stage, check_unaligned, stage
from torch.nn import functional as F

from gcahng.engine.stages.common import EdgesOut
from gcahng.engine.stages.norm_gelu import NormGeluInputs
from gcahng.engine.weights import NormWeights
from gcahng.testing import assert_close_to_truth, seeded


@stage("rows")
def forward(run: Run) -> Results:
    found = Collected()
    for _, _, rows in run.tiles():
        e = run.stages.norm_gelu.forward(run.inputs.weights.norm, rows(run.inputs.edges.full), "in")
        found.add(e=e.full, low=e.low)
    return found.results()


def test_stage(backend):
    check_stage(backend, forward)


def test_same_bits_twice(backend):
    check_same_bits(backend, forward)


@pytest.mark.simulated
def test_unaligned(emulator):
    check_unaligned(emulator, forward)


def inputs(rows: int, dim: int, device: torch.device) -> NormGeluInputs:
    t, gamma, beta = (seeded(*shape, seed=k).to(device) for k, shape in enumerate(((rows, dim), (dim,), (dim,)), 1))
    return NormGeluInputs(t, NormWeights(gamma, beta))


def test_outputs_on_their_own(backend):
    given = inputs(24, 9, backend.device)
    check_outputs_on_their_own(
        lambda full, low: backend.ops.norm_gelu_(given, EdgesOut(full, low)), given.t, backend.low
    )


@pytest.mark.simulated
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)
def test_the_widest_rows(emulator, low):
    given = inputs(3, 1024, emulator.device)
    y, y_low = torch.full_like(given.t, torch.nan), torch.full_like(given.t, torch.nan, dtype=low)
    emulator.norm_gelu_(given, EdgesOut(y, y_low))

    def norm_gelu(dtype: torch.dtype) -> torch.Tensor:
        gamma, beta = (x.to(dtype) for x in given.norm)
        return F.layer_norm(F.gelu(given.t.to(dtype)), (1024,), gamma, beta, 1e-5)

    assert_close_to_truth(y, norm_gelu(torch.float32), norm_gelu(torch.float64))
    assert torch.equal(y_low, y.to(low))


@pytest.mark.simulated
def test_what_the_kernels_do_not_take_is_an_error(emulator):
    def norm_gelu(dim: int, low: torch.dtype, dtype: torch.dtype = torch.float32) -> None:
        t = torch.zeros(1, dim, dtype=dtype)
        norm = NormWeights(t[0].clone(), t[0].clone())
        emulator.norm_gelu_(NormGeluInputs(t, norm), EdgesOut(t.clone(), torch.zeros(1, dim, dtype=low)))

    norm_gelu(8, torch.float16)
    for wrong in ((1025, torch.float32), (8, torch.float64), (8, torch.bfloat16, torch.float64)):
        with pytest.raises(RuntimeError, match="cudaError_t 1"):
            norm_gelu(*wrong)


@pytest.mark.simulated
@pytest.mark.parametrize("low", [torch.float32, torch.float16], ids=str)
def test_edges_in_bfloat16_go_with_products_in_bfloat16(emulator, low):
    given = inputs(3, 8, emulator.device)
    given = given._replace(t=given.t.bfloat16())
    with pytest.raises(RuntimeError, match="cudaError_t 1"):
        emulator.norm_gelu_(given, EdgesOut(None, torch.zeros(3, 8, dtype=low)))
