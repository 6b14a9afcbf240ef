"""Edge to node: S_i = Σ_j GELU(W_e e_ij + b_e), each node's sum over its edges (docs/math/edge_to_node.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.schedule import Band, NodeSum, Tile
from gcahng.engine.schema import TileNumbers, Written, declare
from gcahng.engine.stages.common import Edges, Stage
from gcahng.engine.weights import ToNodeSums, ToNodeWeights


class EdgeToNodeInputs(NamedTuple):
    """The product e W_eᵀ (T, D) in the dtype of products, and the bias (D,)."""

    tile: TileNumbers
    product: Tensor
    bias: Tensor


class EdgeToNodeSum(NamedTuple):
    """S (classes + reach, K, D), which is added to."""

    sum: Written


class EdgeToNodeGradients(NamedTuple):
    """ds (classes + reach, K, D), the gradient of S → dp (T, D), which may be the product; db (D,) is added to."""

    ds: Tensor
    dp: Written
    db: Written | None


FORWARD = declare("edge_to_node_fwd_", "edge_to_node.forward", EdgeToNodeInputs, EdgeToNodeSum)
BACKWARD = declare("edge_to_node_bwd_", "edge_to_node.backward", EdgeToNodeInputs, EdgeToNodeGradients)


class EdgeToNode(Stage):
    """In plain torch."""

    def forward(self, tile: Tile, w: ToNodeWeights, e: Edges, into: NodeSum) -> None:
        """Adds the tile's edges (T, D) to both of their ends."""
        g = self.context.grid(tile, F.gelu(F.linear(e.low, w.weight, w.bias.to(self.context.compute))))
        accumulate = self.context.like.dtype
        into.add_rows(tile, g.sum(dim=(2, 3), dtype=accumulate))
        if tile.mirrored < tile.offsets:
            into.add_columns(tile, g[:, :, tile.mirrored :].sum(dim=1, dtype=accumulate), skip=tile.mirrored)

    def backward(
        self, tile: Tile, w: ToNodeWeights, e: Edges, ds: Band, into: ToNodeSums | None, de: Tensor | None
    ) -> None:
        """Adds the gradients of a tile's edges and of the weights.

        Args:
            tile: where the edges lie.
            w: as in the forward.
            e: as in the forward.
            ds: gradient of S.
            into: where the weights' gradients are added, if they are wanted.
            de: where the edges' gradient (T, D) is added, if it is wanted.
        """
        context = self.context
        product = F.linear(e.low, w.weight, w.bias.to(context.compute)).to(context.like.dtype)
        both = ds.rows(tile)[:, :, None, None].expand(*self.schedule.shape(tile), self.dim).contiguous()
        if tile.mirrored < tile.offsets:
            both[:, :, tile.mirrored :] += ds.columns(tile)[:, None, tile.mirrored :]
        dp = torch.ops.aten.gelu_backward(both.view(tile.rows, self.dim), product)
        if into is not None:
            into.bias.add_(dp.sum(dim=0))
        self._products(w, dp.to(context.compute), e, into, de)

    def _products(self, w: ToNodeWeights, dp: Tensor, e: Edges, into: ToNodeSums | None, de: Tensor | None) -> None:
        if into is not None:
            self.context.add_product(into.weight, dp.T, e.low)
        if de is not None:
            self.context.add_product(de, dp, w.weight)


class FusedEdgeToNode(EdgeToNode):
    """The product is the library's; what follows it is one op."""

    def forward(self, tile: Tile, w: ToNodeWeights, e: Edges, into: NodeSum) -> None:
        self.ops(FORWARD, self._inputs(tile, w, e), EdgeToNodeSum(into.wrapped))

    def backward(
        self, tile: Tile, w: ToNodeWeights, e: Edges, ds: Band, into: ToNodeSums | None, de: Tensor | None
    ) -> None:
        inputs = self._inputs(tile, w, e)
        dp = inputs.product
        self.ops(BACKWARD, inputs, EdgeToNodeGradients(ds.wrapped, dp, None if into is None else into.bias))
        self._products(w, dp, e, into, de)

    def _inputs(self, tile: Tile, w: ToNodeWeights, e: Edges) -> EdgeToNodeInputs:
        product = torch.mm(e.low, w.weight.T, out=self.context.scratch("p", tile.rows, self.dim))
        return EdgeToNodeInputs(self.context.numbers(tile), product, w.bias)
