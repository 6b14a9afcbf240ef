"""head: BatchNorm's moments, θ = sigmoid(ê Wᵀ + b), and the backward through both."""

from __future__ import annotations

import importlib

import pytest
import torch
from stages.cases import Collected, Results, Run, Setup
from stages.checks import (
    case,
    check_same_bits,
    check_stage,
    check_sum,
    check_unaligned,
    inputs_of,
    run_of,
    stage,
    truth_of,
)

from gcahng.engine.stages.common import Edges
from gcahng.engine.stages.head import HeadBackward, HeadGradients
from gcahng.testing import seeded


@stage("rows", products=False)
def moments(run: Run) -> Results:
    into = run.stages.head.moments()
    for _, tile, rows in run.tiles():
        run.stages.head.add_moments(tile, run.edges(rows), into)
    return {"moments": into}


@stage("rows")
def forward(run: Run) -> Results:
    found = Collected()
    for number, _, rows in run.tiles():
        e = run.edges(rows)
        out = torch.full_like(e.full, torch.nan) if number else None
        theta = run.stages.head.forward(run.inputs.head, e, out)
        assert out is None or theta.data_ptr() == out.data_ptr()
        found.add(theta=theta)
    return found.results()


@stage("rows")
def backward(run: Run) -> Results:
    found, gradients = Collected(), HeadGradients(run.dim, run.like)
    for _, _, rows in run.tiles():
        given = (run.inputs.head, run.edges(rows), rows(run.inputs.theta), rows(run.inputs.upstream))
        alone = run.stages.head.backward(*given, None).clone()
        dy = run.stages.head.backward(*given, gradients)
        assert torch.equal(alone, dy)
        found.add(dy=dy)
    return found.results() | {"pre_e": gradients.pre_e, "pre": gradients.pre, "sums": gradients.sums}


@stage("rows", products=False)
def norm_backward(run: Run) -> Results:
    """Through the batch's statistics, and with the running ones."""
    found, sums = Collected(), HeadGradients(run.dim, run.like)
    sums.sums.copy_(run.inputs.head_sums)
    for _, tile, rows in run.tiles():
        for name, given in (("training", sums), ("eval", None)):
            dy = rows(run.inputs.upstream)
            de = run.stages.head.norm_backward(tile, run.inputs.head, run.edges(rows), dy, given)
            found.add(**{name: de})
    return found.results()


directions = pytest.mark.parametrize("direction", [forward, backward, norm_backward], ids=str)


@directions
def test_stage(backend, direction):
    check_stage(backend, direction)


def test_most_views(backend):
    check_stage(backend, norm_backward, [backend.most_views])


@pytest.mark.parametrize("direction", [moments, forward, backward, norm_backward], ids=str)
def test_same_bits_twice(backend, direction):
    check_same_bits(backend, direction)


@pytest.mark.simulated
@directions
def test_unaligned(emulator, direction):
    check_unaligned(emulator, direction)


def check_moments(run: Run, setup: Setup) -> None:
    found, truth = (moments.results(one)["moments"] for one in (run, truth_of(setup, run.inputs)))
    torch.testing.assert_close(found, truth, rtol=1e-13, atol=1e-13 * truth.abs().max().item())


def test_moments(backend):
    """Gathered in fp64 whatever the edges' type: a variance is a difference of them."""
    for setup, precision in backend.cases(forward):
        with case(setup, precision):
            check_moments(run_of(backend, setup, precision), setup)
            check_moments(Run(setup, inputs_of(setup, precision, backend.device)), setup)


def test_variance_of_edges_far_from_zero(backend):
    """A spread of 1e-3 around 100: its square has seven digits left in fp64, and none in fp32."""
    setup = Setup(6, 3, 19, 40)
    inputs = inputs_of(setup, "float32", backend.device)
    full = (100 + 1e-3 * inputs.edges.full.double()).float()
    run = run_of(backend, setup, "float32", inputs._replace(edges=Edges(full, full)))
    mean, square = moments.results(run)["moments"] / run.schedule.nodes**2
    counts = [
        torch.where(torch.arange(tile.offsets) < tile.mirrored, 1.0, 2.0)[:, None].expand(run.schedule.shape(tile))
        for tile in run.schedule.tiles
    ]
    weight = torch.cat([count.flatten() for count in counts]).double()[:, None].to(full.device)
    weight /= run.schedule.nodes**2
    centered = full.double() - (weight * full.double()).sum(dim=0)
    torch.testing.assert_close(square - mean**2, (weight * centered.square()).sum(dim=0), rtol=1e-4, atol=0)


def test_coefficients_near_zero(backend):
    """θ keeps its digits where it is all but 0."""
    setup = Setup(3, 2, 16, 100)
    inputs = inputs_of(setup, "float32", backend.device)
    bias = torch.linspace(-80, 80, setup.dim, device=backend.device)
    inputs = inputs._replace(head=inputs.head._replace(bias=bias))
    truth = forward.results(truth_of(setup, inputs))["theta"]
    found = forward.results(run_of(backend, setup, "float32", inputs))["theta"]
    assert bool((truth < 1e-20).any())
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=0)


@pytest.fixture
def few_programs(monkeypatch):
    """So that each goes through several blocks of rows, as where there are thousands."""
    kernels = importlib.import_module("gcahng.kernels.head")
    monkeypatch.setattr(kernels, "HEAD", kernels.HEAD._replace(programs=1))


@pytest.mark.simulated
def test_several_blocks_of_rows_a_program(triton, few_programs):
    check_stage(triton, backward, [(Setup(6, 3, 19, 300), "float64")])
    setup = Setup(6, 3, 19, 60)
    check_moments(run_of(triton, setup, "float32"), setup)


@pytest.mark.simulated
def test_partial_sums_of_more_rows_than_a_block_takes_at_least(emulator):
    rows = 33_000
    theta, dtheta = torch.sigmoid(seeded(rows, 1, seed=1)), seeded(rows, 1, seed=2)
    dpre, total = torch.full((rows, 1), torch.nan), torch.zeros(1)
    emulator.head_bwd_(HeadBackward(theta, dtheta, dpre, total))
    torch.testing.assert_close(dpre, dtheta * theta * (1 - theta))
    check_sum(total, dpre)
