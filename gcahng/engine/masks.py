"""Dropout masks of the edges. They are drawn again wherever they are needed, and never stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.schedule import Schedule, Tile
from gcahng.reference.philox import edge_masks

MASKS_AT_ONCE = 1 << 15


class EdgeDropout(NamedTuple):
    """Dropout of the edges' attention weights.

    Attributes:
        p: chance that a weight is dropped.
        seed: of the random numbers.
        draw: number of the pass, 0-dim int64. Each pass has masks of its own.
    """

    p: float
    seed: int
    draw: Tensor


class MaskSource:
    """One layer's masks, a tile at a time in the order of the schedule. A few tiles are drawn together.

    A mask depends on the edge, the layer and the draw alone (gcahng.reference.philox.edge_masks).

    Args:
        schedule: the tiles.
        layer: the layer's number.
        dropout: what is drawn.
        dtype: of the masks.
    """

    def __init__(self, schedule: Schedule, layer: int, dropout: EdgeDropout, dtype: torch.dtype) -> None:
        self._schedule, self._layer, self._dropout, self._dtype = schedule, layer, dropout, dtype
        self._places = {tile.first_row: number for number, tile in enumerate(schedule.tiles)}
        self._drawn: dict[int, Tensor] = {}

    def __call__(self, tile: Tile) -> Tensor:
        """The factors (A, K, O, K, 2) of a tile's attention weights, for i and then for j: 0 or 1 / (1 − p)."""
        number = self._places[tile.first_row]
        if number not in self._drawn:
            self._drawn = self._draw(number)
        return self._drawn[number]

    def _draw(self, first: int) -> dict[int, Tensor]:
        """The masks of the tiles from number `first` on, as many as are drawn together."""
        tiles, last, edges = self._schedule.tiles, first, 0
        while last < len(tiles) and edges < MASKS_AT_ONCE:
            edges += tiles[last].rows
            last += 1
        pairs = [_nodes(self._schedule, tile, self._dropout.draw.device) for tile in tiles[first:last]]
        i = torch.cat([pair[0] for pair in pairs])
        j = torch.cat([pair[1] for pair in pairs])
        p, seed, draw = self._dropout
        mask = edge_masks(i, j, layer=self._layer, draw=draw, seed=seed, p=p, symmetric=self._schedule.symmetric)
        mask = mask.to(self._dtype) / (1 - p)
        parts = mask.split([tile.rows for tile in tiles[first:last]])
        return {
            first + step: part.view(*self._schedule.shape(tiles[first + step]), 2) for step, part in enumerate(parts)
        }


def _nodes(schedule: Schedule, tile: Tile, device: torch.device) -> tuple[Tensor, Tensor]:
    """The nodes i and j (T,) of a tile's edges."""
    view = torch.arange(schedule.views, device=device)
    first = torch.arange(tile.first_class, tile.first_class + tile.classes, device=device)
    i = (first[:, None] * schedule.views + view)[:, :, None, None]
    j = (schedule.column_classes(tile, device)[..., None] * schedule.views + view)[:, None]
    i, j = torch.broadcast_tensors(i, j)
    return i.reshape(-1), j.reshape(-1)
