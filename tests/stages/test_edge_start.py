"""edge_start: e⁰_ij = x̂_i ∘ x̂_j, and its backward."""

from __future__ import annotations

import pytest
import torch
from stages.cases import Collected, Results, Run
from stages.checks import (
    check_outputs_on_their_own,
    check_same_bits,
    check_stage,
    check_unaligned,
    stage,
)

from gcahng.engine.schema import TileNumbers
from gcahng.engine.stages.common import EdgesOut
from gcahng.engine.stages.edge_start import EdgeStartGradients, EdgeStartInputs
from gcahng.testing import seeded

ONE_EDGE = TileNumbers(1, 1, 1, first=0, offset=1, mirrored=1, classes=2)


@stage("tiles")
def forward(run: Run) -> Results:
    found = Collected()
    for _, tile, _ in run.tiles():
        e = run.stages.edge_start.forward(tile, run.band(run.inputs.nodes), "in")
        found.add(e=e.full, low=e.low)
    return found.results()


@stage("tiles", products=False)
def backward(run: Run) -> Results:
    x, into = run.band(run.inputs.nodes), run.node_sum()
    for _, tile, rows in run.tiles():
        run.stages.edge_start.backward(tile, x, rows(run.inputs.upstream), into)
    return {"dx": into.total()}


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


def test_outputs_on_their_own(backend):
    x = seeded(5, 2, 9, seed=9).to(backend.device)
    inputs = EdgeStartInputs(TileNumbers(2, 2, 3, first=1, offset=0, mirrored=1, classes=3), x)
    check_outputs_on_their_own(
        lambda full, low: backend.ops.edge_start_fwd_(inputs, EdgesOut(full, low)), x.new_empty(24, 9), backend.low
    )


def test_rounding_to_bfloat16(cpp):
    """To the nearest, ties to even; and a NaN whose bits a carry would run through stays one."""
    x = torch.stack([seeded(500, 3, seed=seed).bfloat16().float() for seed in (1, 2)], dim=1)
    exact, rounded = torch.empty(500, 3), torch.empty(500, 3, dtype=torch.bfloat16)
    for row, pair in enumerate(x):  # one edge each: the product of its two nodes
        inputs = EdgeStartInputs(ONE_EDGE, pair.contiguous())
        cpp.ops.edge_start_fwd_(inputs, EdgesOut(exact[row : row + 1], rounded[row : row + 1]))
    bits = exact.view(torch.int32)
    assert all(bool((bits & 0x1FFFF == tie).any()) for tie in (0x08000, 0x18000))
    assert torch.equal(rounded, exact.bfloat16())

    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32).view(1, 2)
    low = torch.zeros(1, 2, dtype=torch.bfloat16)
    cpp.ops.edge_start_fwd_(EdgeStartInputs(ONE_EDGE, torch.cat((nan, torch.ones(1, 2)))), EdgesOut(None, low))
    assert bool(low.isnan().all())


def test_sums_of_bfloat16_are_an_error(cpp):
    x, square = torch.zeros(2, 4).bfloat16(), torch.zeros(4, 4).bfloat16()
    tile = TileNumbers(1, 2, 1, first=0, offset=0, mirrored=0, classes=1)
    with pytest.raises(RuntimeError, match="gcahng::edge_start_bwd_: .* must be float32 or float64"):
        cpp.ops.edge_start_bwd_(EdgeStartInputs(tile, x), EdgeStartGradients(square, x.clone()))


def test_more_views_than_the_ops_take(cpp):
    tile = TileNumbers(1, 65, 1, first=0, offset=1, mirrored=1, classes=2)
    with pytest.raises(RuntimeError, match="tile has 65 samples a class; it must have 64 at most"):
        cpp.ops.edge_start_fwd_(EdgeStartInputs(tile, torch.zeros(65 * 2, 4)), EdgesOut(torch.zeros(65 * 65, 4), None))
