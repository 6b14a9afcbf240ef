"""Edge start: e⁰_ij = x̂_i ∘ x̂_j, and its backward, two sums at nodes (docs/math/edge_start.md)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gcahng.engine.schedule import Band, NodeSum, Tile
from gcahng.engine.schema import TileNumbers, Written, declare
from gcahng.engine.stages.common import Edges, EdgesOut, Stage


class EdgeStartInputs(NamedTuple):
    """Normalized rows x (classes + reach, K, D)."""

    tile: TileNumbers
    x: Tensor


class EdgeStartGradients(NamedTuple):
    """de (T, D); dx, as x, is added to."""

    de: Tensor
    dx: Written


FORWARD = declare("edge_start_fwd_", "edge_start.forward", EdgeStartInputs, EdgesOut)
BACKWARD = declare("edge_start_bwd_", "edge_start.backward", EdgeStartInputs, EdgeStartGradients)


class EdgeStart(Stage):
    """In plain torch."""

    def forward(self, tile: Tile, x: Band, slot: str) -> Edges:
        """x̂ → e⁰ (T, D)."""
        product = x.rows(tile)[:, :, None, None] * x.columns(tile)[:, None]
        return self.context.edges(product.view(tile.rows, self.dim))

    def backward(self, tile: Tile, x: Band, de: Tensor, into: NodeSum) -> None:
        """Adds both ends' parts of dx̂, given de (T, D)."""
        de = self.context.grid(tile, de)
        into.add_rows(tile, (de * x.columns(tile)[:, None]).sum(dim=(2, 3)))
        into.add_columns(tile, (de * x.rows(tile)[:, :, None, None]).sum(dim=1))


class FusedEdgeStart(EdgeStart):
    """As fused ops."""

    def forward(self, tile: Tile, x: Band, slot: str) -> Edges:
        e = self.context.edge_room(slot, tile.rows)
        self.ops(FORWARD, EdgeStartInputs(self.context.numbers(tile), x.wrapped), self.context.out(e))
        return e

    def backward(self, tile: Tile, x: Band, de: Tensor, into: NodeSum) -> None:
        inputs = EdgeStartInputs(self.context.numbers(tile), x.wrapped)
        self.ops(BACKWARD, inputs, EdgeStartGradients(de, into.wrapped))
