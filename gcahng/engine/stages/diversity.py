"""Diversity of the coefficients, J_div: the sums that it needs, and its gradient (docs/math/diversity.md)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gcahng.engine.schedule import Band, NodeSum, Schedule, Tile
from gcahng.engine.schema import TileNumbers, Written, declare
from gcahng.engine.stages.common import Stage


class DiversityInputs(NamedTuple):
    """θ (T, D)."""

    tile: TileNumbers
    theta: Tensor


class DiversityOutputs(NamedTuple):
    """sum and square (classes + reach, K, D) of DiversitySums, which are added to."""

    sum: Written
    square: Written


class DiversityGradient(NamedTuple):
    """mean (classes + reach, K, D) of each node's θ; scale (0-dim); dtheta (T, D), which is added to."""

    mean: Tensor
    scale: Tensor
    dtheta: Written


FORWARD = declare("diversity_fwd_", "diversity.forward", DiversityInputs, DiversityOutputs)
BACKWARD = declare("diversity_bwd_", "diversity.backward", DiversityInputs, DiversityGradient)


class DiversitySums:
    """Of x = θ − ½ over the ordered pairs of all edges.

    Attributes:
        sum: Σ_j x_ij at every node i.
        square: Σ x² at the anchors of edges, so that its total is Σ_ij x².
    """

    def __init__(self, schedule: Schedule, dim: int, like: Tensor) -> None:
        self.sum = NodeSum(schedule, dim, like=like)
        self.square = NodeSum(schedule, dim, like=like)


class Diversity(Stage):
    """In plain torch."""

    def forward(self, tile: Tile, theta: Tensor, into: DiversitySums) -> None:
        """Adds a tile's part of the sums. θ (T, D) may be lost."""
        grid = self.context.grid(tile, theta.sub_(0.5))
        square = grid.square()
        squares = square.sum(dim=(2, 3))
        into.sum.add_rows(tile, grid.sum(dim=(2, 3)))
        if tile.mirrored < tile.offsets:
            into.sum.add_columns(tile, grid[:, :, tile.mirrored :].sum(dim=1), skip=tile.mirrored)
            squares += square[:, :, tile.mirrored :].sum(dim=(2, 3))
        into.square.add_rows(tile, squares)

    def backward(self, tile: Tile, theta: Tensor, mean: Band, scale: Tensor, into: Tensor) -> None:
        """Adds scale times the gradient of ½ Σ_ij (θ_ij − m_i)², both directions of an edge, to into (T, D).

        Args:
            tile: where the edges lie.
            theta: (T, D).
            mean: the nodes' row means m; their own share of the gradient is zero.
            scale: 0-dim.
            into: what is added to.
        """
        grid, out = self.context.grid(tile, theta), self.context.grid(tile, into)
        out += (grid - mean.rows(tile)[:, :, None, None]) * scale
        if tile.mirrored < tile.offsets:
            skip = tile.mirrored
            out[:, :, skip:] += (grid[:, :, skip:] - mean.columns(tile)[:, None, skip:]) * scale


class FusedDiversity(Diversity):
    """As fused ops."""

    def forward(self, tile: Tile, theta: Tensor, into: DiversitySums) -> None:
        outputs = DiversityOutputs(into.sum.wrapped, into.square.wrapped)
        self.ops(FORWARD, DiversityInputs(self.context.numbers(tile), theta), outputs)

    def backward(self, tile: Tile, theta: Tensor, mean: Band, scale: Tensor, into: Tensor) -> None:
        inputs = DiversityInputs(self.context.numbers(tile), theta)
        self.ops(BACKWARD, inputs, DiversityGradient(mean.wrapped, scale, into))
