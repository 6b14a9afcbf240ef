"""Dropout masks on tiles, as the stages in plain torch draw them, are the reference's."""

from __future__ import annotations

import pytest
import torch
from stages.test_gate_masks import CHANCES, CPU, DRAWS, LAYERS, SEEDS, wanted_masks

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
        for tile in (*schedule.tiles, *reversed(schedule.tiles)):  # any order, again and again
            found = source(tile)
            assert found.shape == (*schedule.shape(tile), 2)
            assert torch.equal(found.view(-1, 2), wanted[_nodes(schedule, tile, CPU)])
