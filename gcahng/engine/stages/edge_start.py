"""Edge start: e⁰_ij = x̂_i ∘ x̂_j. Its backward is two sums over edges at nodes (docs/math/edge_start.md)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gcahng.engine.schedule import Band, NodeSum, Tile
from gcahng.engine.schema import TileNumbers, Written, declare
from gcahng.engine.stages.common import Edges, EdgesOut, Stage


class EdgeStartInputs(NamedTuple):
    """What the edges start from.

    Attributes:
        tile: where the edges lie.
        x: normalized rows x̂ (classes + reach, K, D).
    """

    tile: TileNumbers
    x: Tensor


class EdgeStartGradients(NamedTuple):
    """What the backward takes and adds to.

    Attributes:
        de: gradient of e⁰ (T, D).
        dx: gradient of x̂ (classes + reach, K, D), which is added to.
    """

    de: Tensor
    dx: Written


declare("edge_start_fwd_", "edge_start.forward", EdgeStartInputs, EdgesOut)
declare("edge_start_bwd_", "edge_start.backward", EdgeStartInputs, EdgeStartGradients)


class EdgeStart(Stage):
    """The edge start in plain torch."""

    def forward(self, tile: Tile, x: Band, slot: str) -> Edges:
        """Computes e⁰ (T, D).

        Args:
            tile: where the edges lie.
            x: normalized rows x̂ (n, D) as a band.
            slot: a name for the memory of the result (see StageContext.scratch).
        """
        product = x.rows(tile)[:, :, None, None] * x.columns(tile)[:, None]
        return self.context.edges(product.view(tile.rows, self.dim))

    def backward(self, tile: Tile, x: Band, de: Tensor, into: NodeSum) -> None:
        """Adds the gradient of x̂ at both ends of the edges.

        Args:
            tile: where the edges lie.
            x: as in the forward.
            de: gradient of e⁰ (T, D).
            into: the sum (n, D) that is added to.
        """
        de = self.context.grid(tile, self.context.full(de))
        into.add_rows(tile, (de * x.columns(tile)[:, None]).sum(dim=(2, 3)))
        into.add_columns(tile, (de * x.rows(tile)[:, :, None, None]).sum(dim=1))


class FusedEdgeStart(EdgeStart):
    """The edge start as fused ops."""

    def forward(self, tile: Tile, x: Band, slot: str) -> Edges:
        e = self.context.edge_room(slot, tile.rows)
        self.ops.edge_start_fwd_(EdgeStartInputs(self.context.numbers(tile), x.wrapped), self.context.out(e))
        return e

    def backward(self, tile: Tile, x: Band, de: Tensor, into: NodeSum) -> None:
        inputs = EdgeStartInputs(self.context.numbers(tile), x.wrapped)
        self.ops.edge_start_bwd_(inputs, EdgeStartGradients(de, into.wrapped))
