"""Edge update: a layer's gate, mlp_in and mlp_out together, each way (docs/math/edge_update.md)."""

from __future__ import annotations

from functools import cache
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
    """What of an edge update is to be saved for its backward.

    Attributes:
        gate: a name for the memory of e¹ and of what the gate's backward needs; None: they are not saved.
        h: (T, 4D) receives what `mlp_in` saves, if given.
        moments: receives its row moments, if given.
        s: (T, D) receives the pre-norm sums, if given.
    """

    gate: str | None = None
    h: Tensor | None = None
    moments: RowMoments | None = None
    s: Tensor | None = None


class Updated(NamedTuple):
    """The edges that leave the layer; e¹ and what the gate's backward needs have a meaning where they were saved."""

    edges: Edges | None
    e1: Edges | None
    gate: GateSaved | None


class EdgeRecord(NamedTuple):
    """What the backward of an edge update needs: the edges that entered, e¹, the gate's, the hidden product (None: it
    is formed again), its row moments, and the pre-norm sums."""

    e: Edges
    e1: Edges
    gate: GateSaved
    h: Tensor | None
    moments: RowMoments
    s: Tensor


class EdgeUpdateSaved(NamedTuple):
    """Where the kernel of the whole update leaves what is saved; None where it is not."""

    e1: Tensor | None
    low: Tensor | None
    weight_i: Tensor | None
    weight_j: Tensor | None
    h: Tensor | None
    moments: RowMoments | None
    s: Tensor | None


class EdgeUpdate(Stage):
    """One stage after the other, each as its implementation has it."""

    def __init__(self, context: StageContext, gate: Gate, mlp_in: MlpIn, mlp_out: MlpOut) -> None:
        super().__init__(context)
        self.gate, self.mlp_in, self.mlp_out = gate, mlp_in, mlp_out

    def forward(
        self, layer: Layer, tile: Tile, e: Edges, saving: Saving, slot: str, sums: Tensor | None = None
    ) -> Updated:
        """e → the edges that leave the layer, and what is to be saved.

        Args:
            layer: weights and tokens.
            tile: where the edges lie.
            e: edges that enter.
            saving: what is to be saved.
            slot: a name for the memory of the result, which may be e's own.
            sums: (2, D) float64, given where nothing but BatchNorm's moments is wanted of these edges. An
                implementation that adds them itself (as Head.add_moments does) returns no edges then.
        """
        e1, gate = self.gate.forward(layer, tile, e, saving.gate or "e1")
        g, moments = self.mlp_in.forward(layer.closing, e1, saving.h, saving.moments)
        return Updated(self.mlp_out.forward(layer.closing, e1, g, moments, saving.s, slot)[1], e1, gate)

    def backward(
        self, layer: Layer, tile: Tile, record: EdgeRecord, d: Tensor, into: LayerSums | None, want_edge: bool
    ) -> Tensor | None:
        """d (T, D), the gradient of the edges that left → of those that entered, if wanted. d may be lost.

        Args:
            layer, tile: as in the forward.
            record: what was saved, or formed again.
            d: the upstream gradient.
            into: where the gradients of weights and tokens are added, if given.
            want_edge: whether the gradient of the edges that entered is wanted.
        """
        gradients = None if into is None else into.gradients
        de1 = self.mlp_backward(layer, record, d, gradients)
        return self.gate.backward(layer, tile, record.e, record.gate, de1, into, want_edge)

    def mlp_backward(self, layer: Layer, record: EdgeRecord, d: Tensor, into: EdgeGradients | None) -> Tensor:
        """d (T, D) → de¹ (T, D), through both halves of the MLP and the residual around it."""
        w, add_product = layer.weights, self.context.add_product
        out = self.mlp_out.backward(w, record.e1, record.s, d, record.moments, into)
        g, dh = self.mlp_in.backward(w, record.e1, record.h, out.low, out.rows, into)
        if into is not None:
            add_product(into.out_g, out.scaled.T, g)
            add_product(into.w1, dh.T, record.e1.low)
        add_product(out.ds, dh, w.w1)
        return out.ds


class TritonEdgeUpdate(EdgeUpdate):
    """Forward in one kernel where a block holds whole rows: neither e¹ nor its hidden vectors go through memory."""

    def __init__(self, context: StageContext, gate: Gate, mlp_in: MlpIn, mlp_out: MlpOut) -> None:
        super().__init__(context, gate, mlp_in, mlp_out)
        from gcahng.kernels import edge_update  # needs triton

        self._kernels = edge_update
        self.small = context.like.is_cuda and _shared_memory(context.like.device) < edge_update.SHARED_MEMORY

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
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
