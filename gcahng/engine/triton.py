"""The stages as Triton kernels, with the edge MLP's products among them: what comes after a product is done in its
epilogue, before the result goes to memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcahng.engine.fused import FusedStages, _numbers
from gcahng.engine.schedule import Tile
from gcahng.engine.stages import Edges, RowMoments
from gcahng.engine.weights import EdgeWeights
from gcahng.kernels import close as close_kernels
from gcahng.kernels import edge_mlp as edge_mlp_kernels
from gcahng.kernels import hidden as hidden_kernels


class TritonStages(FusedStages):
    """In fp64, which the kernels' products are not written for, those of FusedStages. Forward, the edge MLP is one
    kernel where a block holds whole rows."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._epilogues = self.compute is not torch.float64

    def mlp(
        self,
        tile: Tile,
        w: EdgeWeights,
        e1: Edges,
        keep_h: Tensor | None,
        keep_moments: RowMoments | None,
        keep_s: Tensor | None,
        slot: str,
        sums: Tensor | None = None,
    ) -> Edges | None:
        crowded = keep_h is not None or (sums is not None and keep_s is not None and keep_s.itemsize == 2)
        if not (self._epilogues and edge_mlp_kernels.takes(self.dim, e1.low.itemsize, crowded)):
            return super().mlp(tile, w, e1, keep_h, keep_moments, keep_s, slot, sums)
        e = None if sums is not None else self._pair(slot, tile.rows)
        out = (None, None) if e is None else (e.full, self._low(e))
        kept = (keep_h, *(keep_moments or (None, None)), keep_s)
        edge_mlp_kernels.forward(_numbers(self.schedule, tile), e1.full, e1.low, *w, *kept, *out, sums)
        return e

    def _hidden(self, w: EdgeWeights, e1: Edges, h: Tensor | None, g: Tensor, moments: RowMoments) -> None:
        if self._epilogues:
            hidden_kernels.product_forward(e1.low, w.w1, w.b1, h, g, *moments)
        else:
            super()._hidden(w, e1, h, g, moments)

    def _close(self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, s: Tensor, e: Edges | None) -> None:
        if not self._epilogues:
            super()._close(w, e1, g, moments, s, e)
            return
        close_kernels.product_forward(g, w.w2, e1.full, *moments, w.w, w.d, s)
        if e is not None:
            self.ops.norm_gelu_(s, w.gamma, w.beta, e.full, self._low(e))

    def _hidden_backward(
        self, w: EdgeWeights, ds: Tensor, h: Tensor, rows: tuple[Tensor, ...], g: Tensor, dh: Tensor, db: Tensor | None
    ) -> None:
        if self._epilogues:
            hidden_kernels.product_backward(ds, w.w2, h, w.b1, *rows, g, dh, db)
        else:
            super()._hidden_backward(w, ds, h, rows, g, dh, db)
