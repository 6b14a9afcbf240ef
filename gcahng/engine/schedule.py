"""Cuts the pairs of a batch into tiles, and brings node tensors to a tile and sums back to nodes.

Nodes are in canonical order, class by class: node a·K + v is view v of class a. A tile holds whole classes: A anchor
classes from first_class on, and for each anchor class a the O column classes (a + k) mod C for k from first_offset on.
Its edges are a tensor (A, K, O, K, D): anchor class, anchor view, offset, column view.

The symmetric schedule is a circulant half band of classes. Offset 0 pairs a class with itself, and holds both
directions of these pairs. An offset 0 < k < C/2 stands for both directions of its pairs, and so does k = C/2 (for even
C) for the first C/2 classes. So the diagonal costs n·K/2 extra edges, and nothing else is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gcahng.engine.ranks import Ranks


class Tile(NamedTuple):
    """A rectangle of the schedule.

    Attributes:
        first_class: the first anchor class.
        classes: anchor classes, A.
        first_offset: the first offset.
        offsets: offsets, O.
        mirrored: the tile's offsets from this one on stand for both directions of their pairs.
        first_row: where the tile's edges start in a tensor of all edges.
        rows: edges T of the tile.
    """

    first_class: int
    classes: int
    first_offset: int
    offsets: int
    mirrored: int
    first_row: int
    rows: int


class Schedule(NamedTuple):
    """The tiles of a batch, or of a process's part of it.

    Attributes:
        classes: classes C of the batch.
        views: samples of a class, K.
        symmetric: whether one edge stands for both directions of a pair.
        tiles: the tiles.
        ranks: the processes that have the other tiles; None if there are no others.
    """

    classes: int
    views: int
    symmetric: bool
    tiles: tuple[Tile, ...]
    ranks: Ranks | None = None

    @property
    def reach(self) -> int:
        """The largest offset."""
        return max((tile.first_offset + tile.offsets - 1 for tile in self.tiles), default=0)

    @property
    def rows(self) -> int:
        """Edges of all tiles."""
        return sum(tile.rows for tile in self.tiles)

    @property
    def tile_rows(self) -> int:
        """Edges of the largest tile."""
        return max((tile.rows for tile in self.tiles), default=0)

    @property
    def nodes(self) -> int:
        """Nodes n of the batch."""
        return self.classes * self.views

    def shape(self, tile: Tile) -> tuple[int, int, int, int]:
        """The shape (A, K, O, K) of a tile's edges."""
        return tile.classes, self.views, tile.offsets, self.views

    def column_classes(self, tile: Tile, device: torch.device) -> Tensor:
        """The column class at each offset of each anchor class, (A, O)."""
        first = torch.arange(tile.first_class, tile.first_class + tile.classes, device=device)
        offset = torch.arange(tile.first_offset, tile.first_offset + tile.offsets, device=device)
        return (first[:, None] + offset) % self.classes

    def room(self, like: Tensor, *shape: int) -> Tensor:
        """Memory that these tiles write to and `complete` then completes; zeros if other processes write to it too."""
        return like.new_empty(shape) if self.ranks is None else like.new_zeros(shape)

    def complete(self, *sums: Tensor) -> None:
        """Turns sums over these tiles into sums over the tiles of all processes, in place."""
        self.complete_later(*sums)()

    def complete_later(self, *sums: Tensor) -> Callable[[], None]:
        """Starts what `complete` does, and returns what waits for it. Until then the sums must be left alone."""
        return (lambda: None) if self.ranks is None else self.ranks.start_adding(*sums).finish


def _split(count: int, most: int) -> list[tuple[int, int]]:
    """Splits `count` into as few parts of at most `most` as possible, nearly equal ones: (start, length)."""
    parts = -(-count // max(1, most))
    edges = [count * part // parts for part in range(parts + 1)]
    return [(start, stop - start) for start, stop in zip(edges[:-1], edges[1:], strict=True)]


def bands(classes: int, symmetric: bool) -> list[tuple[int, int, int]]:
    """The bands that tiles are cut from.

    Args:
        classes: classes C of the batch.
        symmetric: whether one edge stands for both directions of a pair.

    Returns:
        For each band the first offset, how many offsets it has, and for how many anchor classes, counted from class 0.
    """
    if not symmetric:
        return [(0, classes, classes)]
    half = [(classes // 2, 1, classes // 2)] if classes % 2 == 0 else []
    return [(0, (classes - 1) // 2 + 1, classes), *half]


def default_tile_rows(dim: int, compute: torch.dtype, memory: str = "store", device_type: str = "cpu") -> int:
    """How many edges a tile should have.

    They are enough for the matrix products to run at a high rate, and few enough that their hidden vectors take little
    memory. There are twice as many in the mode that spends memory for time. On a GPU they are enough to fill it with
    few launches, at 0.27 GB of hidden vectors in bf16.

    Args:
        dim: channels D.
        compute: dtype of products.
        memory: store, hidden or recompute.
        device_type: "cpu" or "cuda".
    """
    if device_type == "cuda":
        return min(65536, max(4096, 2**25 // dim))
    doubled = 2 if memory == "hidden" else 1
    return min(8192, max(256, doubled * 2**21 // (dim * compute.itemsize)))


def make_schedule(classes: int, views: int, *, symmetric: bool, tile_rows: int, ranks: Ranks | None = None) -> Schedule:
    """Cuts the pairs of a batch into tiles.

    Args:
        classes: classes C.
        views: samples of a class, K.
        symmetric: whether one edge stands for both directions of a pair.
        tile_rows: edges that a tile has at most; one class against another always fits.
        ranks: the processes that share the tiles. Each takes an equal part of every band's anchor classes, which is
            none for some of them if there are fewer classes than processes.

    Returns:
        This process's schedule.
    """
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


class ByTile:
    """A tensor that holds something of one tile after the other, and each tile's part of it.

    The parts are made once, since a new view costs as much time of the host as the launch of a kernel.

    Args:
        schedule: the tiles.
        x: the tensor; its first dimension is that of the tiles' edges, unless `lengths` says how many each tile has.
        lengths: see x.

    Attributes:
        x: the tensor.
    """

    def __init__(self, schedule: Schedule, x: Tensor, lengths: list[int] | None = None) -> None:
        self.x = x
        parts = x.split([tile.rows for tile in schedule.tiles] if lengths is None else lengths)
        self._parts = {tile.first_row: part for tile, part in zip(schedule.tiles, parts, strict=True)}

    def __getitem__(self, tile: Tile) -> Tensor:
        """A tile's part."""
        return self._parts[tile.first_row]


class Wrapped(NamedTuple):
    """Memory for a node tensor that wraps around: behind the last class come the first ones again.

    Attributes:
        whole: (C + reach, K, W).
        nodes: the classes themselves (C, K, W).
        head: the same as (n, W).
        front: the first `reach` classes (reach, K, W).
        tail: what is behind the last class (reach, K, W).
    """

    whole: Tensor
    nodes: Tensor
    head: Tensor
    front: Tensor
    tail: Tensor


def wrapped_shape(schedule: Schedule, width: int) -> tuple[int, int]:
    """Rows and width of the memory of a wrapped node tensor of this width."""
    return (schedule.classes + schedule.reach) * schedule.views, width


def wrap(schedule: Schedule, memory: Tensor) -> Wrapped:
    """Views of memory that has a wrapped_shape."""
    whole = memory.view(-1, schedule.views, memory.shape[1])
    nodes = whole[: schedule.classes]
    front, tail = whole[: schedule.reach], whole[schedule.classes :]
    return Wrapped(whole, nodes, memory[: schedule.nodes], front, tail)


class Band:
    """A node tensor as tiles see it: rows by anchor and columns by offset, without copies per tile.

    Args:
        schedule: the tiles.
        x: node tensor (n, W), or what `wrap` made, filled in.

    Attributes:
        nodes: x as (C, K, W).
        wrapped: the same, and behind the last class the first ones again (C + reach, K, W).
    """

    def __init__(self, schedule: Schedule, x: Tensor | Wrapped) -> None:
        if isinstance(x, Wrapped):
            self.nodes, self.wrapped = x.nodes, x.whole
            return
        x = x.reshape(schedule.classes, schedule.views, -1)
        self.nodes = x
        self.wrapped = torch.cat((x, x[: schedule.reach]))

    def rows(self, tile: Tile) -> Tensor:
        """The rows of a tile's anchors, (A, K, W)."""
        return self.nodes[tile.first_class : tile.first_class + tile.classes]

    def columns(self, tile: Tile) -> Tensor:
        """The rows of a tile's columns, (A, O, K, W): a view in which neighboring anchors overlap."""
        _, views, width = self.wrapped.shape
        step = views * width
        start = (tile.first_class + tile.first_offset) * step
        size = (tile.classes, tile.offsets, views, width)
        return self.wrapped.as_strided(size, (step, step, width, 1), self.wrapped.storage_offset() + start)


def bands_of(schedule: Schedule, *parts: Wrapped) -> tuple[Band, ...]:
    """Bands of what `wrap` made. The heads are filled in; their first classes are copied behind the last ones here."""
    torch._foreach_copy_([x.tail for x in parts], [x.front for x in parts])
    return tuple(Band(schedule, x) for x in parts)


class NodeSum:
    """A sum over edges for every node, to which both ends of each edge add, in a fixed order.

    Args:
        schedule: the tiles.
        width: channels W.
        like: a tensor of the dtype and on the device of the sums.
        room: memory for the sums, as `wrap` made it, which holds zeros; by default it is new.

    Attributes:
        wrapped: the sums (C + reach, K, W); those behind the last class belong to the first classes.
    """

    def __init__(self, schedule: Schedule, width: int, *, like: Tensor, room: Wrapped | None = None) -> None:
        self.schedule = schedule
        self._room = wrap(schedule, like.new_zeros(wrapped_shape(schedule, width))) if room is None else room
        self.wrapped = self._room.whole

    def add_rows(self, tile: Tile, values: Tensor) -> None:
        """Adds values (A, K, W) at a tile's anchors. They are summed over the columns already."""
        self.wrapped[tile.first_class : tile.first_class + tile.classes] += values

    def add_columns(self, tile: Tile, values: Tensor, skip: int = 0) -> None:
        """Adds values at a tile's columns.

        Args:
            tile: where the columns lie.
            values: (A, O − skip, K, W), summed over the anchors' views already.
            skip: how many of the tile's first offsets are left out.
        """
        start = tile.first_class + tile.first_offset + skip
        for anchor in range(tile.classes):
            self.wrapped[start + anchor : start + anchor + tile.offsets - skip] += values[anchor]

    def total(self) -> Tensor:
        """The sums (n, W) over the tiles of all processes. To be called once, since it adds in place."""
        return totals(self)[0]


def totals(*sums: NodeSum) -> list[Tensor]:
    """NodeSum.total of several sums of a schedule."""
    rooms = [x._room for x in sums]
    torch._foreach_add_([room.front for room in rooms], [room.tail for room in rooms])
    heads = [room.head for room in rooms]
    sums[0].schedule.complete(*heads)
    return heads
