"""mlp_out: s = (g W₂'ᵀ − μ w)/σ + d + e¹ and the edges LayerNorm(GELU(s)); its backward."""

from __future__ import annotations

import importlib

import pytest
import torch
from stages.cases import Collected, Results, Run, Setup
from stages.checks import (
    case,
    check_outputs_on_their_own,
    check_same_bits,
    check_stage,
    check_sum,
    check_unaligned,
    run_of,
    stage,
)

from gcahng.engine.stages.common import RowMoments
from gcahng.engine.stages.mlp_out import (
    MlpOutGradients,
    MlpOutInputs,
    MlpOutOutputs,
    MlpOutReplay,
)
from gcahng.engine.weights import EdgeGradients, Fold, NormWeights
from gcahng.testing import nan_poisoned, seeded


@stage("rows")
def forward(run: Run) -> Results:
    """Behind mlp_in; s is stored where it is asked for."""
    found, w, update = Collected(), run.inputs.weights, run.stages.edge_update
    for number, _, rows in run.tiles():
        e1 = run.edges(rows)
        stored = torch.full_like(e1.full, torch.nan) if number else None
        s, e = update.mlp_out.forward(w, e1, *update.mlp_in.forward(w, e1, None, None), stored, "out")
        if number:
            assert torch.equal(stored.to(s.dtype), s)
        found.add(s=s.to(run.edge_dtype), e=e.full, low=e.low)  # plain torch goes on with rounded values in fp32
    return found.results()


@stage("rows")
def backward(run: Run) -> Results:
    found, into, w = Collected(), EdgeGradients(run.dim, run.like), run.inputs.weights
    update = run.stages.edge_update
    for _, _, rows in run.tiles():
        e1, s = run.edges(rows), rows(run.inputs.sums)
        moments = RowMoments(*(x.clone() for x in update.mlp_in.forward(w, e1, None, None)[1]))
        ds = update.mlp_out.backward(w, e1, s, rows(run.inputs.upstream), moments, None).ds
        found.add(ds=ds)
        out = update.mlp_out.backward(w, e1, s, rows(run.inputs.upstream), moments, into)
        found.add(ds_again=out.ds, low=out.low, scaled=out.scaled)
        found.add(mean_dn=out.rows.mean_dn, mean_n_dn=out.rows.mean_n_dn)
    gamma, beta = into.norm
    return found.results() | {"out": into.out, "out_mean": into.out_mean, "gamma": gamma, "beta": beta}


directions = pytest.mark.parametrize("direction", [forward, backward], ids=str)


@directions
def test_stage(backend, direction):
    check_stage(backend, direction)


@directions
def test_same_bits_twice(backend, direction):
    check_same_bits(backend, direction)


def stored_in_bfloat16(run: Run) -> torch.Tensor:
    """s as it is stored; what goes on is what was stored."""
    found, w, update = [], run.inputs.weights, run.stages.edge_update
    for _, _, rows in run.tiles():
        e1 = run.edges(rows)
        stored = run.nan(*e1.full.shape, dtype=torch.bfloat16)
        s, e = update.mlp_out.forward(w, e1, *update.mlp_in.forward(w, e1, None, None), stored, "out")
        assert torch.equal(s, stored.to(s.dtype))
        again = run.stages.norm_gelu.forward(w.norm, s.clone(), "again")
        assert torch.equal(again.full, e.full) and torch.equal(again.low, e.low)
        found.append(stored)
    return torch.cat(found)


def test_storing_in_bfloat16(backend):
    """The sums are rounded to the nearest bf16, in each precision."""
    first = {precision: setup for setup, precision in reversed([*backend.cases(forward)])}
    for precision, setup in first.items():
        with case(setup, precision), nan_poisoned():
            stored = stored_in_bfloat16(run_of(backend, setup, precision))
            whole = forward.results(run_of(backend, setup, precision))["s"]
            assert torch.equal(stored, whole.bfloat16())


def test_outputs_on_their_own(backend):
    (e1, product), vectors = (seeded(2, 24, 9, seed=1), seeded(4, 9, seed=2))
    e1, product, vectors = (x.to(backend.device) for x in (e1, product, vectors))
    w, d, gamma, beta = vectors
    moments = RowMoments(seeded(24, 1, seed=3).to(e1), torch.ones_like(e1[:, :1]))
    inputs = MlpOutInputs(product.to(backend.low), e1, moments, Fold(w, d), NormWeights(gamma, beta))
    check_outputs_on_their_own(
        lambda full, low: backend.ops.mlp_out_fwd_(inputs, MlpOutOutputs(torch.empty_like(e1), full, low)),
        e1,
        backend.low,
    )


@pytest.mark.simulated
def test_between_products_of_the_library(between_products):
    check_stage(between_products, forward)


@pytest.mark.simulated
def test_several_blocks_of_rows_a_program(triton, monkeypatch):
    """As where there are thousands of blocks."""
    kernels = importlib.import_module("gcahng.kernels.mlp_out")
    monkeypatch.setattr(kernels, "ROWS_BACKWARD", kernels.ROWS_BACKWARD._replace(programs=1))
    check_stage(triton, backward, [(Setup(6, 3, 19, 300), "float64")])


@pytest.mark.simulated
@directions
def test_unaligned(emulator, direction):
    check_unaligned(emulator, direction)


@pytest.mark.simulated
def test_blocks_that_take_several_rows(emulator):
    rows = 4200
    s, dy = seeded(rows, 1, seed=1), seeded(rows, 1, seed=2)
    zero, column = torch.zeros(1), torch.ones(rows, 1)
    ds, scaled, mean_dn, mean_n_dn = (torch.full((rows, 1), torch.nan) for _ in range(4))
    replay = MlpOutReplay(s, s, dy, RowMoments(column, column), Fold(zero, zero), torch.ones(1))
    sums = torch.zeros(4, 1)
    emulator.mlp_out_bwd_(replay, MlpOutGradients(ds, ds, scaled, mean_dn, mean_n_dn, sums))
    for constant in (ds, scaled, mean_dn, mean_n_dn, *(sums[k] for k in (0, 2, 3))):
        assert not constant.any()  # one channel: its norm is constant
    check_sum(sums[1], dy)
