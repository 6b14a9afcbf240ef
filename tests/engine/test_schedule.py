"""Tiles cover every ordered pair once; node tensors meet them without copies; sums at both ends."""

from __future__ import annotations

import pytest
import torch

from gcahng.engine.masks import _nodes
from gcahng.engine.schedule import Band, NodeSum, Schedule, Tile, default_tile_rows, make_schedule
from gcahng.engine.stages.head import weighted_sum
from gcahng.testing import seeded

SCHEDULES = [
    (classes, views, symmetric, rows)
    for classes in (2, 3, 4, 9)
    for views in (2, 3)
    for symmetric in (True, False)
    for rows in (1, 9, 40, 130, 10_000)
]
CPU = torch.device("cpu")

schedules = pytest.mark.parametrize(("classes", "views", "symmetric", "rows"), SCHEDULES)


def grid(schedule: Schedule, tile: Tile, x: torch.Tensor) -> torch.Tensor:
    return x.view(*schedule.shape(tile), *x.shape[1:])


@schedules
def test_every_ordered_pair_once(classes, views, symmetric, rows):
    schedule = make_schedule(classes, views, symmetric=symmetric, tile_rows=rows)
    n = classes * views
    seen = torch.zeros(n, n, dtype=torch.int64)
    for tile in schedule.tiles:
        i, j = _nodes(schedule, tile, CPU)
        assert i.shape == (tile.rows,)
        seen.index_put_((i, j), torch.ones_like(i), accumulate=True)
        back = torch.zeros(schedule.shape(tile), dtype=torch.bool)
        back[:, :, tile.mirrored :] = True
        back = back.flatten()
        seen.index_put_((j[back], i[back]), torch.ones_like(i[back]), accumulate=True)
    assert torch.equal(seen, torch.ones_like(seen))


@schedules
def test_tiles_fit_and_follow_each_other(classes, views, symmetric, rows):
    schedule = make_schedule(classes, views, symmetric=symmetric, tile_rows=rows)
    place = 0
    for tile in schedule.tiles:
        assert tile.first_row == place
        assert tile.rows == tile.classes * tile.offsets * views**2 > 0
        assert tile.rows <= max(rows, views**2)
        assert 0 <= tile.mirrored <= tile.offsets
        assert tile.first_class + tile.classes <= classes
        place += tile.rows
    n = classes * views
    diagonal = n * views
    # Half of the off-diagonal pairs, and a class with itself in both directions.
    wanted = (n * n - diagonal) // 2 + diagonal if symmetric else n * n
    assert schedule.rows == place == wanted
    assert schedule.tile_rows == max(tile.rows for tile in schedule.tiles)
    assert schedule.nodes == n
    assert schedule.reach == (classes // 2 if symmetric else classes - 1)


@schedules
def test_band_shows_both_ends(classes, views, symmetric, rows):
    schedule = make_schedule(classes, views, symmetric=symmetric, tile_rows=rows)
    x = seeded(classes * views, 3, seed=1)
    band = Band(schedule, x)
    for tile in schedule.tiles:
        i, j = (grid(schedule, tile, k) for k in _nodes(schedule, tile, CPU))
        assert torch.equal(band.rows(tile)[:, :, None, None].expand(*i.shape, 3), x[i])
        columns = band.columns(tile)
        assert torch.equal(columns[:, None].expand(*j.shape, 3), x[j])
        assert columns.untyped_storage().data_ptr() == band.wrapped.untyped_storage().data_ptr(), "no copy"
        assert torch.equal(schedule.column_classes(tile, CPU) * views, j[:, 0, :, 0])


@schedules
def test_node_sum_adds_at_both_ends(classes, views, symmetric, rows):
    schedule = make_schedule(classes, views, symmetric=symmetric, tile_rows=rows)
    n = classes * views
    total = NodeSum(schedule, 2, like=torch.zeros((), dtype=torch.float64))
    wanted = torch.zeros(n, 2, dtype=torch.float64)
    for number, tile in enumerate(schedule.tiles):
        i, j = _nodes(schedule, tile, CPU)
        values = seeded(tile.rows, 2, seed=number, dtype=torch.float64)
        edges = grid(schedule, tile, values)
        total.add_rows(tile, edges.sum(dim=(2, 3)))
        wanted.index_add_(0, i, values)
        if tile.mirrored < tile.offsets:
            total.add_columns(tile, edges[:, :, tile.mirrored :].sum(dim=1), skip=tile.mirrored)
            back = edges[:, :, tile.mirrored :].reshape(-1, 2)
            wanted.index_add_(0, grid(schedule, tile, j)[:, :, tile.mirrored :].flatten(), back)
    torch.testing.assert_close(total.total(), wanted, rtol=1e-13, atol=1e-13)


@schedules
def test_weighted_sum_counts_ordered_pairs(classes, views, symmetric, rows):
    schedule = make_schedule(classes, views, symmetric=symmetric, tile_rows=rows)
    ones = sum(weighted_sum(schedule, tile, torch.ones(tile.rows, 1)) for tile in schedule.tiles)
    assert ones.item() == schedule.nodes**2
    symmetric_values = seeded(schedule.nodes, schedule.nodes, seed=3, dtype=torch.float64)
    symmetric_values = symmetric_values + symmetric_values.T
    found = sum(
        weighted_sum(schedule, tile, symmetric_values[_nodes(schedule, tile, CPU)][:, None]) for tile in schedule.tiles
    )
    torch.testing.assert_close(found[0], symmetric_values.sum(), rtol=1e-12, atol=1e-12)


def test_tiles_of_one_shape_are_near_equal():
    """No tile is a mere remainder: products of few rows run slowly."""
    schedule = make_schedule(41, 3, symmetric=True, tile_rows=100)
    heights = {(tile.first_offset, tile.classes) for tile in schedule.tiles}
    by_offset: dict[int, set[int]] = {}
    for offset, height in heights:
        by_offset.setdefault(offset, set()).add(height)
    assert all(max(found) - min(found) <= 1 for found in by_offset.values())


@pytest.mark.parametrize("dim", [16, 64, 512, 1024, 4096])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory", ["store", "hidden"])
def test_default_tiles(dim, compute, memory):
    """The 4D hidden vectors of a tile are within 32 MB, but for very wide embeddings."""
    rows = default_tile_rows(dim, compute, memory)
    assert 256 <= rows <= 8192
    assert rows == 256 or rows * 4 * dim * compute.itemsize <= 32 << 20
