"""Which anchor, and which class of negatives, each mix of a tile is of; gcahng.engine.stages.mix gives the order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.schedule import ByTile, Schedule, Tile
from gcahng.engine.stages.common import StageContext


class MixIndex(NamedTuple):
    """Which anchor and which class each of a tile's mixes is of. Classes are places, 0 … C − 1.

    Attributes:
        view: the anchor's view k (mixes,).
        anchor: the anchor's class a (mixes,).
        negative: the negatives' class c (mixes,).
        node: the anchor's node (mixes,).
    """

    view: Tensor
    anchor: Tensor
    negative: Tensor
    node: Tensor

    @property
    def place(self) -> tuple[Tensor, Tensor, Tensor]:
        """The indices of the mixes in a (K, C, C) array."""
        return self.view, self.anchor, self.negative


class BatchMixes(NamedTuple):
    """All mixes of a schedule, tile by tile.

    Attributes:
        place: where each mix lies in a (K, C, C) array that is seen as (K C²,), (mixes,).
        negative: the negatives' class c (mixes,).
        node: the anchor's node (mixes,).
        others: whether a ≠ c, so that the mix is a negative, (mixes,) bool.
    """

    place: Tensor
    negative: Tensor
    node: Tensor
    others: Tensor


def tile_mixes(schedule: Schedule, tile: Tile) -> int:
    """How many mixes a tile has."""
    return tile.classes * schedule.views * (2 * tile.offsets - tile.mirrored)


def by_tile(schedule: Schedule, x: Tensor) -> ByTile:
    """A tensor over the mixes of all tiles, and each tile's part of it."""
    return ByTile(schedule, x, [tile_mixes(schedule, tile) for tile in schedule.tiles])


def batch_mixes(context: StageContext) -> BatchMixes:
    """The mixes of a pass. They are listed once for each kind of batch."""
    schedule, device = context.schedule, context.like.device

    def make() -> BatchMixes:
        if not schedule.tiles:  # of a process that has no part of the batch
            none = torch.empty(0, dtype=torch.int64, device=device)
            return BatchMixes(none, none, none, none.bool())
        parts = [mix_index(schedule, tile, device) for tile in schedule.tiles]
        view, anchor, negative, node = (torch.cat(x) for x in zip(*parts, strict=True))
        place = (view * schedule.classes + anchor) * schedule.classes + negative
        return BatchMixes(place, negative, node, anchor != negative)

    return context.constant(("mixes", schedule.classes, schedule.views, schedule.tiles, device), make)


def mix_index(schedule: Schedule, tile: Tile, device: torch.device) -> MixIndex:
    """Lists a tile's mixes in their order."""
    first = torch.arange(tile.first_class, tile.first_class + tile.classes, device=device)[:, None, None]
    view = torch.arange(schedule.views, device=device)
    columns = schedule.column_classes(tile, device)
    parts = [torch.broadcast_tensors(view[:, None], first, columns[:, None])]
    if tile.mirrored < tile.offsets:
        parts.append(torch.broadcast_tensors(view, columns[:, tile.mirrored :, None], first))
    k, a, c = (torch.cat([part[axis].reshape(-1) for part in parts]) for axis in range(3))
    return MixIndex(k, a, c, a * schedule.views + k)
