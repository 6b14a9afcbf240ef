"""The stages as Triton kernels, with the edge MLP's products among them: what comes after a product is done in its
epilogue, before the result goes to memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from gcahng.engine.fused import FusedStages
from gcahng.engine.schedule import Tile
from gcahng.engine.stages import Edges, Keep, RowMoments, Tokens, Update
from gcahng.engine.weights import EdgeWeights
from gcahng.kernels import edge_update as edge_update_kernels
from gcahng.kernels import mlp_in as mlp_in_kernels
from gcahng.kernels import mlp_out as mlp_out_kernels


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class TritonStages(FusedStages):
    """In fp64, which the kernels' products are not written for, those of FusedStages. Forward, the edge update is
    one kernel where a block holds whole rows."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._epilogues = self.compute is not torch.float64
        self._small = self.like.is_cuda and _shared_memory(self.like.device) < edge_update_kernels.SHARED_MEMORY

    def update(
        self,
        layer: int,
        number: int,
        tile: Tile,
        w: EdgeWeights,
        closing: EdgeWeights,
        tokens: Tokens,
        e: Edges,
        keep: Keep,
        slot: str,
        sums: Tensor | None = None,
    ) -> Update:
        crowded = self._small or keep.h is not None
        crowded |= sums is not None and keep.s is not None and keep.s.itemsize == 2
        if not (self._epilogues and edge_update_kernels.takes(self.dim, closing.w1.itemsize, crowded)):
            return super().update(layer, number, tile, w, closing, tokens, e, keep, slot, sums)
        e1, gate, kept = None, None, (None,) * 4
        if keep.gate is not None:
            e1, gate = self._gate_room(keep.gate, tile.rows)
            kept = (e1.full, self._low(e1), gate.p, gate.q)
        left, out = None, (None, None)
        if sums is None:
            left = self._pair(slot, tile.rows)
            out = (left.full, self._low(left))
        edge_update_kernels.forward(
            *self._gate_inputs(layer, tile, tokens),
            w.gamma,
            w.beta,
            e.full,
            *closing,
            self.scratch("gate rows", edge_update_kernels.ROWS.value, tile.rows, wide=True),
            *kept,
            keep.h,
            *(keep.moments or (None, None)),
            keep.s,
            *out,
            sums,
        )
        return Update(left, e1, gate)

    def _hidden(self, w: EdgeWeights, e1: Edges, h: Tensor | None, g: Tensor, moments: RowMoments) -> None:
        if self._epilogues:
            mlp_in_kernels.product_forward(e1.low, w.w1, w.b1, h, g, *moments)
        else:
            super()._hidden(w, e1, h, g, moments)

    def _close(self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, s: Tensor, e: Edges | None) -> None:
        if not self._epilogues:
            super()._close(w, e1, g, moments, s, e)
            return
        mlp_out_kernels.product_forward(g, w.w2, e1.full, *moments, w.w, w.d, s)
        if e is not None:
            self.ops.norm_gelu_(s, w.gamma, w.beta, e.full, self._low(e))

    def _mlp_in_backward(
        self, w: EdgeWeights, ds: Tensor, h: Tensor, rows: tuple[Tensor, ...], g: Tensor, dh: Tensor, db: Tensor | None
    ) -> None:
        if self._epilogues:
            mlp_in_kernels.product_backward(ds, w.w2, h, w.b1, *rows, g, dh, db)
        else:
            super()._mlp_in_backward(w, ds, h, rows, g, dh, db)
