"""Edge update: a layer's gate, mlp_in and mlp_out together, forward and backward (docs/math/edge_update.md)."""

from __future__ import annotations

from functools import cache
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.schedule import Tile
from gcahng.engine.stages.common import Edges, EdgesOut, RowMoments, Stage, StageContext
from gcahng.engine.stages.gate import Gate, GateSaved, Layer, LayerSums
from gcahng.engine.stages.mlp_in import MlpIn
from gcahng.engine.stages.mlp_out import MlpOut
from gcahng.engine.weights import EdgeGradients


class Saving(NamedTuple):
    """What an edge update saves for its backward, and where. What is None is not saved.

    Attributes:
        gate: a name for the memory of e¹ and of what the gate's backward needs.
        h: memory for the hidden products (T, 4D).
        moments: memory for their row moments.
        s: memory for the pre-norm sums (T, D).
    """

    gate: str | None = None
    h: Tensor | None = None
    moments: RowMoments | None = None
    s: Tensor | None = None


class Updated(NamedTuple):
    """What an edge update returns.

    Attributes:
        edges: the edges that leave the layer; None if only their moments were wanted.
        e1: e¹, the edges behind the gate. It has a meaning only if it was saved.
        gate: what the gate's backward needs. It has a meaning only if it was saved.
    """

    edges: Edges | None
    e1: Edges | None
    gate: GateSaved | None


class EdgeRecord(NamedTuple):
    """What the backward of an edge update needs.

    Attributes:
        e: the edges that entered.
        e1: e¹, the edges behind the gate.
        gate: what the gate's backward needs.
        h: hidden products (T, 4D); None if they are formed again.
        moments: their row moments.
        s: pre-norm sums (T, D).
    """

    e: Edges
    e1: Edges
    gate: GateSaved
    h: Tensor | None
    moments: RowMoments
    s: Tensor


class EdgeUpdateSaved(NamedTuple):
    """Where the kernel of the whole update writes what is saved; None where it is not saved.

    Attributes:
        e1: e¹ (T, D) in the accumulating dtype.
        low: e¹ (T, D) in the dtype of products.
        weight_i: attention weights of the edges' first nodes (T, 1).
        weight_j: attention weights of the edges' second nodes (T, 1).
        h: hidden products (T, 4D).
        moments: their row moments.
        s: pre-norm sums (T, D).
    """

    e1: Tensor | None
    low: Tensor | None
    weight_i: Tensor | None
    weight_j: Tensor | None
    h: Tensor | None
    moments: RowMoments | None
    s: Tensor | None


class EdgeUpdate(Stage):
    """The update as one stage after the other.

    Args:
        context: what all stages of the pass work with.
        gate: the gate.
        mlp_in: the first half of the edge MLP.
        mlp_out: the second half.
    """

    def __init__(self, context: StageContext, gate: Gate, mlp_in: MlpIn, mlp_out: MlpOut) -> None:
        super().__init__(context)
        self.gate, self.mlp_in, self.mlp_out = gate, mlp_in, mlp_out

    def forward(
        self, layer: Layer, tile: Tile, e: Edges, saving: Saving, slot: str, sums: Tensor | None = None
    ) -> Updated:
        """Updates a tile's edges.

        Args:
            layer: weights and tokens.
            tile: where the edges lie.
            e: edges that enter.
            saving: what is to be saved.
            slot: a name for the memory of the result, which may be that of e.
            sums: Σ e and Σ e² (2, D) float64, if nothing but BatchNorm's moments is wanted of these edges. An
                implementation may add them itself, as Head.add_moments does, and then returns no edges.
        """
        e1, gate = self.gate.forward(layer, tile, e, saving.gate or "e1")
        g, moments = self.mlp_in.forward(layer.closing, e1, saving.h, saving.moments)
        return Updated(self.mlp_out.forward(layer.closing, e1, g, moments, saving.s, slot)[1], e1, gate)

    def backward(
        self, layer: Layer, tile: Tile, record: EdgeRecord, d: Tensor, into: LayerSums | None, want_edge: bool
    ) -> Tensor | None:
        """Differentiates the update of a tile's edges.

        Args:
            layer: as in the forward.
            tile: as in the forward.
            record: what was saved, or formed again.
            d: gradient of the edges that left (T, D), which may be overwritten.
            into: the gradients of weights and tokens, which are added to; None if they are not wanted.
            want_edge: whether the gradient of the edges that entered is wanted.

        Returns:
            That gradient (T, D), or None.
        """
        gradients = None if into is None else into.gradients
        de1 = self.mlp_backward(layer, record, d, gradients)
        return self.gate.backward(layer, tile, record.e, record.gate, de1, into, want_edge)

    def mlp_backward(self, layer: Layer, record: EdgeRecord, d: Tensor, into: EdgeGradients | None) -> Tensor:
        """The gradient of e¹ (T, D), through both halves of the MLP and the residual around it; see `backward`."""
        w, add_product = layer.weights, self.context.add_product
        out = self.mlp_out.backward(w, record.e1, record.s, d, record.moments, into)
        g, dh = self.mlp_in.backward(w, record.e1, record.h, out.low, out.rows, into)
        if into is not None:
            add_product(into.out_g, self.transposed(out.scaled), g)
            add_product(into.w1, self.transposed(dh), record.e1.low)
        add_product(out.ds, dh, w.w1)
        return out.ds


class TritonEdgeUpdate(EdgeUpdate):
    """The forward in one kernel where a block holds whole rows, so that neither e¹ nor hidden vectors go to memory."""

    def __init__(self, context: StageContext, gate: Gate, mlp_in: MlpIn, mlp_out: MlpOut) -> None:
        super().__init__(context, gate, mlp_in, mlp_out)
        from gcahng.kernels import edge_update  # needs triton

        self._kernels = edge_update
        self.small = shared_memory(context.like.device) < edge_update.SHARED_MEMORY

    def forward(
        self, layer: Layer, tile: Tile, e: Edges, saving: Saving, slot: str, sums: Tensor | None = None
    ) -> Updated:
        crowded = self.small or saving.h is not None
        crowded |= sums is not None and saving.s is not None and saving.s.itemsize == 2
        if not self._kernels.takes(self.dim, layer.closing.w1.itemsize, crowded):
            return super().forward(layer, tile, e, saving, slot, sums)
        context, e1, gate, of_gate = self.context, None, None, (None,) * 4
        if saving.gate is not None:
            e1, gate = self.gate.room(saving.gate, tile.rows)
            of_gate = (e1.full, context.low(e1), gate.weight_i, gate.weight_j)
        left, out = None, EdgesOut(None, None)
        if sums is None:
            left = context.edge_room(slot, tile.rows)
            out = context.out(left)
        self._kernels.forward(
            self.gate.inputs(layer, tile, e),
            layer.closing,
            context.wide("gate rows", self._kernels.ROWS.value, tile.rows),
            EdgeUpdateSaved(*of_gate, saving.h, saving.moments, saving.s),
            out,
            sums,
        )
        return Updated(left, e1, gate)


@cache
def shared_memory(device: torch.device) -> float:
    """Bytes of shared memory that a block may have; where there is no GPU, no limit."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else inf
