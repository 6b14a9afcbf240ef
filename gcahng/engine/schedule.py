"""Which tiles cover the pairs of a batch, and how node tensors meet a tile.

Nodes are in canonical order, class-major: node a·K + v is view v of class a. A tile holds whole classes: A anchor
classes from first_class on, and for each of them O columns of classes, (a + k) mod C for k from first_offset on. Its
edges are a tensor (A, K, O, K, D): anchor class and view, offset, view. The schedule is a circulant half band of
classes: offset 0 is a class with itself (both directions, counted once), an offset 0 < k < C/2 stands for both
directions of its pairs, and so does k = C/2 (even C) for the first C/2 classes. So the whole diagonal costs n·K/2
extra edges, nothing else is computed twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gcahng.engine.ranks import Ranks


class Tile(NamedTuple):
    """first_class … + classes, first_offset … + offsets; offsets from `mirrored` on stand for both directions;
    first_row: where the tile's edges start in a tensor of all edges."""

    first_class: int
    classes: int
    first_offset: int
    offsets: int
    mirrored: int
    first_row: int
    rows: int


class Schedule(NamedTuple):
    """classes C, views K, reach: the largest offset; rows: edges in all tiles; tile_rows: edges in the largest; ranks:
    the processes that have the other tiles, if any."""

    classes: int
    views: int
    symmetric: bool
    tiles: tuple[Tile, ...]
    ranks: Ranks | None = None

    @property
    def reach(self) -> int:
        return max((tile.first_offset + tile.offsets - 1 for tile in self.tiles), default=0)

    @property
    def rows(self) -> int:
        return sum(tile.rows for tile in self.tiles)

    @property
    def tile_rows(self) -> int:
        return max((tile.rows for tile in self.tiles), default=0)

    @property
    def nodes(self) -> int:
        return self.classes * self.views

    def shape(self, tile: Tile) -> tuple[int, int, int, int]:
        """(A, K, O, K)"""
        return tile.classes, self.views, tile.offsets, self.views

    def column_classes(self, tile: Tile, device: torch.device) -> Tensor:
        """(A, O): the class at each offset of each anchor class."""
        first = torch.arange(tile.first_class, tile.first_class + tile.classes, device=device)
        offset = torch.arange(tile.first_offset, tile.first_offset + tile.offsets, device=device)
        return (first[:, None] + offset) % self.classes

    def room(self, like: Tensor, *shape: int) -> Tensor:
        """For what these tiles write and `complete` then makes whole; empty where they write all of it."""
        return like.new_empty(shape) if self.ranks is None else like.new_zeros(shape)

    def complete(self, *sums: Tensor) -> None:
        """Makes sums over these tiles, in place, those over all tiles."""
        if self.ranks is not None:
            self.ranks.add_up(*sums)


def _split(count: int, most: int) -> list[tuple[int, int]]:
    """count in as few near-equal parts of at most `most` as possible: (start, length)."""
    parts = -(-count // max(1, most))
    edges = [count * part // parts for part in range(parts + 1)]
    return [(start, stop - start) for start, stop in zip(edges[:-1], edges[1:], strict=True)]


def bands(classes: int, symmetric: bool) -> list[tuple[int, int, int]]:
    """What tiles are cut from: the first offset, offsets, and anchor classes, the first ones."""
    if not symmetric:
        return [(0, classes, classes)]
    half = [(classes // 2, 1, classes // 2)] if classes % 2 == 0 else []
    return [(0, (classes - 1) // 2 + 1, classes), *half]


def default_tile_rows(dim: int, compute: torch.dtype, memory: str = "store", device_type: str = "cpu") -> int:
    """Edges a tile: enough for the matrix products to run at a high rate, few enough that its hidden vectors take
    little memory; twice as many in the mode that spends memory for time. On a GPU enough to fill it, with few
    launches: 0.27 GB of hidden vectors in bf16."""
    if device_type == "cuda":
        return min(65536, max(4096, 2**25 // dim))
    doubled = 2 if memory == "hidden" else 1
    return min(8192, max(256, doubled * 2**21 // (dim * compute.itemsize)))


def make_schedule(classes: int, views: int, *, symmetric: bool, tile_rows: int, ranks: Ranks | None = None) -> Schedule:
    """Tiles of at most tile_rows edges (or one class against one, if that is more). ranks: the processes that share
    them; each takes an equal part of every band's anchor classes (none, where there are fewer than processes)."""
    tiles: list[Tile] = []
    row = 0
    block = views * views
    rank, count = (0, 1) if ranks is None else (ranks.rank, ranks.count)
    for first_offset, offsets, anchors in bands(classes, symmetric):
        start, stop = anchors * rank // count, anchors * (rank + 1) // count
        if start == stop:
            continue
        for offset, width in _split(offsets, tile_rows // block):
            for first, height in _split(stop - start, tile_rows // (block * width)):
                rows = height * width * block
                mirrored = (1 if first_offset + offset == 0 else 0) if symmetric else width
                tiles.append(Tile(start + first, height, first_offset + offset, width, mirrored, row, rows))
                row += rows
    return Schedule(classes, views, symmetric, tuple(tiles), ranks)


class Band:
    """A node tensor (n, W) that tiles look at: rows by anchor, columns by offset, without copying."""

    def __init__(self, schedule: Schedule, x: Tensor) -> None:
        x = x.reshape(schedule.classes, schedule.views, -1)
        self.nodes = x
        self.wrapped = torch.cat((x, x[: schedule.reach]))

    def rows(self, tile: Tile) -> Tensor:
        """(A, K, W)"""
        return self.nodes[tile.first_class : tile.first_class + tile.classes]

    def columns(self, tile: Tile) -> Tensor:
        """(A, O, K, W), a view in which neighboring anchors overlap."""
        _, views, width = self.wrapped.shape
        step = views * width
        start = (tile.first_class + tile.first_offset) * step
        size = (tile.classes, tile.offsets, views, width)
        return self.wrapped.as_strided(size, (step, step, width, 1), self.wrapped.storage_offset() + start)


class NodeSum:
    """Sums over edges at their two ends, (n, W), in a fixed order."""

    def __init__(self, schedule: Schedule, width: int, *, like: Tensor) -> None:
        self.schedule, self.classes = schedule, schedule.classes
        self.wrapped = like.new_zeros(schedule.classes + schedule.reach, schedule.views, width)

    def add_rows(self, tile: Tile, values: Tensor) -> None:
        """values (A, K, W), already summed over the columns."""
        self.wrapped[tile.first_class : tile.first_class + tile.classes] += values

    def add_columns(self, tile: Tile, values: Tensor, skip: int = 0) -> None:
        """values (A, O - skip, K, W), already summed over the anchor's views; the tile's first `skip` offsets left
        out."""
        start = tile.first_class + tile.first_offset + skip
        for anchor in range(tile.classes):
            self.wrapped[start + anchor : start + anchor + tile.offsets - skip] += values[anchor]

    def total(self) -> Tensor:
        """(n, W), over all tiles; to be asked for once."""
        total = self.wrapped[: self.classes]
        rest = self.wrapped[self.classes :]
        total[: rest.shape[0]] += rest
        self.schedule.complete(total)
        return total.reshape(-1, total.shape[-1])
