"""mix: coefficients and embeddings to negatives, and the backward to both."""

from __future__ import annotations

import pytest
import torch
from stages.cases import Collected, Results, Run, Setup, Some
from stages.checks import check_same_bits, check_stage, check_unaligned, run_of, stage

from gcahng.engine.schedule import Tile
from gcahng.engine.stages.mix import MixUpstream
from gcahng.engine.stages.mix_index import mix_index


def parts(run: Run, tile: Tile, x: torch.Tensor) -> torch.Tensor:
    """A tile's part of a tensor over all mixes, copied."""
    start = sum(mixes(run, other) for other in run.schedule.tiles if other.first_row < tile.first_row)
    return x[start : start + mixes(run, tile)].clone()


def mixes(run: Run, tile: Tile) -> int:
    return len(mix_index(run.schedule, tile, torch.device("cpu")).view)


@stage("tiles", products=False)
def forward(run: Run) -> Results:
    found, mix = Collected(), run.stages.mix
    for _, tile, rows in run.tiles():
        theta = rows(run.inputs.theta)
        negatives = mix.negatives(run.mixing, tile, theta)
        logits, squares = (run.nan(mixes(run, tile)) for _ in range(2))
        mix.logits(run.mixing, tile, theta, logits, squares)
        found.add(negatives=negatives, logits=logits, squares=squares)
    return found.results()


@stage("tiles", products=False)
def backward_theta(run: Run) -> Results:
    found = Collected()
    for _, tile, _ in run.tiles():
        dn = parts(run, tile, run.inputs.mix_upstream)
        found.add(dtheta=run.stages.mix.backward_theta(run.mixing, tile, dn))
    return found.results()


def node_gradients(run: Run, upstream) -> Results:
    into, positive = run.node_sum(), run.node_sum(1)
    for _, tile, rows in run.tiles():
        run.stages.mix.backward_z(run.mixing, tile, upstream(tile, rows(run.inputs.theta)), into, positive)
    return {"dz": into.total(), "d_positive": positive.total()}


@stage("tiles", products=False)
def backward_z(run: Run) -> Results:
    """From the gradient of the logits a·N, and a weight of ‖N‖²."""
    dlogits = run.inputs.logits_upstream
    return node_gradients(run, lambda tile, theta: MixUpstream(theta, parts(run, tile, dlogits), 0.375, None))


@stage("tiles", products=False)
def backward_z_of_negatives(run: Run) -> Results:
    """From the gradient of N itself."""
    dn = run.inputs.mix_upstream
    return node_gradients(run, lambda tile, theta: MixUpstream(theta, None, 0.0, parts(run, tile, dn)))


STAGES = (forward, backward_theta, backward_z, backward_z_of_negatives)
directions = pytest.mark.parametrize("direction", STAGES, ids=str)


@directions
def test_stage(backend, direction):
    check_stage(backend, direction)


@directions
def test_most_views(backend, direction):
    check_stage(backend, direction, [backend.most_views])


@directions
def test_one_view(backend, direction):
    check_stage(backend, direction, [(Setup(5, 1, 12, 10), precision) for precision in ("float64", "float32")])


@directions
def test_same_bits_twice(backend, direction):
    check_same_bits(backend, direction)


@pytest.mark.simulated
@directions
def test_unaligned(emulator, direction):
    check_unaligned(emulator, direction)


def test_a_positive_is_never_farther_than_itself(backend):
    """Its share is 1 and θ does not matter, whatever d⁺ and d⁻ are rounded to: no other sum of the same distance may
    decide."""
    run = run_of(backend, Some(40, 3, 45, 0, tiles=((0, 40, 0, 1, 1),)), "float32")
    ((_, tile, rows),) = run.tiles()
    theta = rows(run.inputs.theta)
    place = theta.view(*run.schedule.shape(tile), -1)
    negatives = run.stages.mix.negatives(run.mixing, tile, theta).clone()
    dtheta = run.stages.mix.backward_theta(run.mixing, tile, torch.ones_like(negatives)).view(place.shape)
    assert bool((dtheta != 0).any())
    for i in range(3):
        assert bool((dtheta[:, i, 0, (i + 1) % 3] == 0).all())
        place[:, i, 0, (i + 1) % 3] += 1
    assert torch.equal(run.stages.mix.negatives(run.mixing, tile, theta), negatives)
