"""Dropout masks on tiles are those of the reference, in Python and in C++ (Triton: test_triton_masks.py)."""

from __future__ import annotations

import pytest
import torch
from mask_cases import (
    CHANCES,
    CPU,
    DRAWS,
    LAYERS,
    SEEDS,
    assert_a_draw_at_the_threshold_is_kept,
    assert_gate_masks,
    wanted_masks,
)

from gcahng.engine.masks import EdgeDropout, MaskSource, _nodes
from gcahng.engine.schedule import make_schedule

CASES = [
    (classes, views, symmetric, rows)
    for classes, views in ((2, 2), (5, 3), (6, 2))
    for symmetric in (True, False)
    for rows in (9, 40, 1000)
]

cases = pytest.mark.parametrize(("classes", "views", "symmetric", "rows"), CASES)


@cases
@pytest.mark.parametrize("seed", SEEDS)
def test_mask_source(classes, views, symmetric, rows, seed, monkeypatch):
    monkeypatch.setattr("gcahng.engine.masks.MASKS_AT_ONCE", 60)  # several draws a sweep, of several tiles each
    schedule = make_schedule(classes, views, symmetric=symmetric, tile_rows=rows)
    for layer, draw, p in zip(LAYERS, DRAWS, CHANCES, strict=True):
        dropout = EdgeDropout(p, seed, torch.tensor(draw))
        wanted = wanted_masks(schedule.nodes, layer=layer, dropout=dropout, symmetric=symmetric)
        source = MaskSource(schedule, layer, dropout, torch.float64)
        order = [*range(len(schedule.tiles)), *reversed(range(len(schedule.tiles)))]  # any order, again and again
        for number in order:
            tile = schedule.tiles[number]
            found = source(number)
            assert found.shape == (*schedule.shape(tile), 2)
            assert torch.equal(found.view(-1, 2), wanted[_nodes(schedule, tile, CPU)])


@pytest.mark.parametrize(
    ("classes", "views", "symmetric", "rows"), [(3, 2, True, 12), (3, 2, False, 12), (4, 3, True, 1000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpp_gate(arch, classes, views, symmetric, rows, dtype):
    schedule = make_schedule(classes, views, symmetric=symmetric, tile_rows=rows)
    for layer, seed, draw, p in zip(LAYERS, SEEDS, DRAWS, CHANCES, strict=True):
        assert_gate_masks("cpp", schedule, layer, EdgeDropout(p, seed, torch.tensor(draw)), dtype)


def test_a_draw_at_the_threshold_is_kept(arch):
    assert_a_draw_at_the_threshold_is_kept("cpp")
