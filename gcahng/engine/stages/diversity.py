"""J_div, the diversity of the coefficients: the sums that it needs, and its gradient (docs/math/diversity.md)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gcahng.engine.schedule import Band, Tile
from gcahng.engine.schema import TileNumbers, Written, declare
from gcahng.engine.stages.common import Stage, StageContext


class DiversityInputs(NamedTuple):
    """What the sums are formed of.

    Attributes:
        tile: where the edges lie.
        theta: θ (T, D).
    """

    tile: TileNumbers
    theta: Tensor


class DiversityOutputs(NamedTuple):
    """What the forward adds to (see DiversitySums).

    Attributes:
        sum: (classes + reach, K, D).
        square: (classes + reach, K, D).
    """

    sum: Written
    square: Written


class DiversityGradient(NamedTuple):
    """What the backward takes and adds to.

    Attributes:
        mean: mean of each node's θ (classes + reach, K, D).
        scale: what the gradient is multiplied with, 0-dim.
        dtheta: gradient of θ (T, D), which is added to.
    """

    mean: Tensor
    scale: Tensor
    dtheta: Written


declare("diversity_fwd_", "diversity.forward", DiversityInputs, DiversityOutputs)
declare("diversity_bwd_", "diversity.backward", DiversityInputs, DiversityGradient)


class DiversitySums:
    """Sums of x = θ − ½ over the ordered pairs of all edges.

    Args:
        context: what all stages of the pass work with.

    Attributes:
        sum: Σ_j x_ij at every node i.
        square: Σ x² at the anchors of edges, so that its total is Σ_ij x².
    """

    def __init__(self, context: StageContext) -> None:
        self.sum, self.square = context.node_sums({"diversity sum": context.dim, "diversity square": context.dim})


class Diversity(Stage):
    """The sums and their gradient in plain torch."""

    def forward(self, tile: Tile, theta: Tensor, into: DiversitySums) -> None:
        """Adds a tile's part to the sums.

        Args:
            tile: where the edges lie.
            theta: θ (T, D), which may be overwritten.
            into: the sums.
        """
        grid = self.context.grid(tile, self.context.full(theta).sub_(0.5))
        square = grid.square()
        squares = square.sum(dim=(2, 3))
        into.sum.add_rows(tile, grid.sum(dim=(2, 3)))
        if tile.mirrored < tile.offsets:
            into.sum.add_columns(tile, grid[:, :, tile.mirrored :].sum(dim=1), skip=tile.mirrored)
            squares += square[:, :, tile.mirrored :].sum(dim=(2, 3))
        into.square.add_rows(tile, squares)

    def backward(self, tile: Tile, theta: Tensor, mean: Band, scale: Tensor, into: Tensor) -> None:
        """Adds scale times the gradient of ½ Σ_ij (θ_ij − m_i)², for both directions of each edge.

        Args:
            tile: where the edges lie.
            theta: θ (T, D).
            mean: the nodes' row means m as a band. The gradient through them is zero.
            scale: 0-dim.
            into: gradient of θ (T, D), which is added to.
        """
        grid, out = self.context.grid(tile, self.context.full(theta)), self.context.grid(tile, into)
        out += (grid - mean.rows(tile)[:, :, None, None]) * scale
        if tile.mirrored < tile.offsets:
            skip = tile.mirrored
            out[:, :, skip:] += (grid[:, :, skip:] - mean.columns(tile)[:, None, skip:]) * scale


class FusedDiversity(Diversity):
    """The sums and their gradient as fused ops."""

    def forward(self, tile: Tile, theta: Tensor, into: DiversitySums) -> None:
        outputs = DiversityOutputs(into.sum.wrapped, into.square.wrapped)
        self.ops.diversity_fwd_(DiversityInputs(self.context.numbers(tile), theta), outputs)

    def backward(self, tile: Tile, theta: Tensor, mean: Band, scale: Tensor, into: Tensor) -> None:
        inputs = DiversityInputs(self.context.numbers(tile), theta)
        self.ops.diversity_bwd_(inputs, DiversityGradient(mean.wrapped, scale, into))
