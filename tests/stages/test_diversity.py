"""diversity: the sums that J_div needs of the coefficients, and its gradient."""

from __future__ import annotations

import pytest
import torch
from stages.cases import Collected, Results, Run
from stages.checks import check_same_bits, check_stage, check_unaligned, stage

from gcahng.engine.schema import TileNumbers
from gcahng.engine.stages.diversity import DiversityInputs, DiversityOutputs, DiversitySums


@stage("tiles", products=False)
def forward(run: Run) -> Results:
    sums = DiversitySums(run.stages.context)
    for _, tile, rows in run.tiles():
        run.stages.diversity.forward(tile, rows(run.inputs.theta), sums)
    return {"sum": sums.sum.total(), "square": sums.square.total()}


@stage("tiles", products=False)
def backward(run: Run) -> Results:
    found, mean = Collected(), run.band(run.inputs.node_upstream)
    for _, tile, rows in run.tiles():
        dtheta = rows(run.inputs.upstream)
        scale = torch.full_like(run.like, -0.375)
        run.stages.diversity.backward(tile, rows(run.inputs.theta), mean, scale, dtheta)
        found.add(dtheta=dtheta)
    return found.results()


directions = pytest.mark.parametrize("direction", [forward, backward], ids=str)


@directions
def test_stage(backend, direction):
    check_stage(backend, direction)


@directions
def test_most_views(backend, direction):
    check_stage(backend, direction, [backend.most_views])


@directions
def test_same_bits_twice(backend, direction):
    check_same_bits(backend, direction)


@pytest.mark.simulated
@directions
def test_unaligned(emulator, direction):
    check_unaligned(emulator, direction)


def test_sums_of_bfloat16_are_an_error(cpp):
    x, theta = torch.zeros(2, 4).bfloat16(), torch.zeros(4, 4).bfloat16()
    inputs = DiversityInputs(TileNumbers(1, 2, 1, first=0, offset=0, mirrored=0, classes=1), theta)
    with pytest.raises(RuntimeError, match="gcahng::diversity_fwd_: .* must be float32 or float64"):
        cpp.ops.diversity_fwd_(inputs, DiversityOutputs(x, x.clone()))
