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
    """What both directions take.

    Attributes:
        tile: where the edges lie.
        product: e W_eᵀ (T, D), in the dtype of products.
        bias: b_e (D,).
    """

    tile: TileNumbers
    product: Tensor
    bias: Tensor


class EdgeToNodeSum(NamedTuple):
    """What the forward adds to.

    Attributes:
        sum: S (classes + reach, K, D).
    """

    sum: Written


class EdgeToNodeGradients(NamedTuple):
    """What the backward takes and writes.

    Attributes:
        ds: gradient of S (classes + reach, K, D).
        dp: gradient of the product (T, D), which may be the product's own memory.
        db: gradient of the bias (D,), which is added to; None if it is not wanted.
    """

    ds: Tensor
    dp: Written
    db: Written | None


declare("edge_to_node_fwd_", "edge_to_node.forward", EdgeToNodeInputs, EdgeToNodeSum)
declare("edge_to_node_bwd_", "edge_to_node.backward", EdgeToNodeInputs, EdgeToNodeGradients)


class EdgeToNode(Stage):
    """The sum in plain torch."""

    def forward(self, tile: Tile, w: ToNodeWeights, e: Edges, into: NodeSum) -> None:
        """Adds what each edge contributes at both of its ends.

        Args:
            tile: where the edges lie.
            w: weights.
            e: edges (T, D).
            into: S (n, D), which is added to.
        """
        g = self.context.grid(tile, F.gelu(F.linear(e.low, w.weight, w.bias.to(self.context.compute))))
        accumulate = self.context.like.dtype
        into.add_rows(tile, g.sum(dim=(2, 3), dtype=accumulate))
        if tile.mirrored < tile.offsets:
            into.add_columns(tile, g[:, :, tile.mirrored :].sum(dim=1, dtype=accumulate), skip=tile.mirrored)

    def backward(
        self,
        tile: Tile,
        w: ToNodeWeights,
        e: Edges,
        ds: Band,
        into: ToNodeSums | None,
        de: Tensor | None,
        add: bool = True,
    ) -> None:
        """Forms the gradients of a tile's edges and of the weights.

        Args:
            tile: where the edges lie.
            w: as in the forward.
            e: as in the forward.
            ds: gradient of S (n, D) as a band.
            into: the weights' gradients, which are added to; None if they are not wanted.
            de: the edges' gradient (T, D), which is added to; None if it is not wanted.
            add: False if `de` holds nothing yet, and is written instead.
        """
        context = self.context
        product = F.linear(e.low, w.weight, w.bias.to(context.compute)).to(context.like.dtype)
        both = ds.rows(tile)[:, :, None, None].expand(*self.schedule.shape(tile), self.dim).contiguous()
        if tile.mirrored < tile.offsets:
            both[:, :, tile.mirrored :] += ds.columns(tile)[:, None, tile.mirrored :]
        dp = torch.ops.aten.gelu_backward(both.view(tile.rows, self.dim), product)
        if into is not None:
            into.bias.add_(dp.sum(dim=0))
        dp = dp.to(context.compute)
        if into is not None:
            context.add_product(into.weight, dp.T, e.low)
        if de is not None:
            context.product(de, dp, w.weight, add)


class FusedEdgeToNode(EdgeToNode):
    """The product is the math library's; what follows it is one fused op each way."""

    def forward(self, tile: Tile, w: ToNodeWeights, e: Edges, into: NodeSum) -> None:
        self.ops.edge_to_node_fwd_(self._inputs(tile, w, e), EdgeToNodeSum(into.wrapped))

    def backward(
        self,
        tile: Tile,
        w: ToNodeWeights,
        e: Edges,
        ds: Band,
        into: ToNodeSums | None,
        de: Tensor | None,
        add: bool = True,
    ) -> None:
        inputs = self._inputs(tile, w, e)
        dp = inputs.product
        self.ops.edge_to_node_bwd_(inputs, EdgeToNodeGradients(ds.wrapped, dp, None if into is None else into.bias))
        if into is not None:
            self.context.add_product(into.weight, self.context.transposed(dp), e.low)
        if de is not None:
            self.context.product(de, dp, w.weight, add)

    def _inputs(self, tile: Tile, w: ToNodeWeights, e: Edges) -> EdgeToNodeInputs:
        """Forms the product, and puts the ops' inputs together."""
        context = self.context
        product = torch.mm(e.low, context.transposed(w.weight), out=context.scratch("p", tile.rows, self.dim))
        return EdgeToNodeInputs(context.numbers(tile), product, w.bias)
