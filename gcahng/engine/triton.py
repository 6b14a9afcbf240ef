"""The stages as Triton kernels, with the edge MLP's products among them: what comes after a product is done in its
epilogue, before the result goes to memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcahng.engine.fused import FusedStages
from gcahng.engine.stages import Edges, RowMoments
from gcahng.engine.weights import EdgeGradients, EdgeWeights
from gcahng.kernels import close as close_kernels
from gcahng.kernels import hidden as hidden_kernels


class TritonStages(FusedStages):
    """In fp64, which the kernels' products are not written for, those of FusedStages."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._epilogues = self.compute is not torch.float64

    def hidden(
        self, w: EdgeWeights, e1: Edges, keep_h: Tensor | None, keep_moments: RowMoments | None
    ) -> tuple[Tensor, RowMoments]:
        if not self._epilogues:
            return super().hidden(w, e1, keep_h, keep_moments)
        rows = e1.low.shape[0]
        g = self.scratch("g", rows, 4 * self.dim)
        moments = keep_moments or RowMoments(*(self.scratch(f"row {k}", rows, 1, wide=True) for k in range(2)))
        hidden_kernels.product_forward(e1.low, w.w1, w.b1, keep_h, g, *moments)
        return g, moments

    def close(
        self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, keep_s: Tensor | None, slot: str
    ) -> tuple[Tensor, Edges]:
        if not self._epilogues:
            return super().close(w, e1, g, moments, keep_s, slot)
        narrowed = keep_s is not None and keep_s.dtype is not self.like.dtype
        s = self.scratch("s", g.shape[0], self.dim, wide=True) if keep_s is None or narrowed else keep_s
        close_kernels.product_forward(g, w.w2, e1.full, *moments, w.w, w.d, s)
        if narrowed:
            s.copy_(keep_s.copy_(s))
        return s, self.norm_gelu(w, s, slot)

    def mlp_backward(
        self,
        w: EdgeWeights,
        e1: Edges,
        s: Tensor,
        d: Tensor,
        h: Tensor | None,
        moments: RowMoments,
        into: EdgeGradients | None,
    ) -> Tensor:
        if not self._epilogues:
            return super().mlp_backward(w, e1, s, d, h, moments, into)
        rows = e1.low.shape[0]
        g, dh = (self.scratch(slot, rows, 4 * self.dim) for slot in ("g", "dn"))
        if h is None:
            h = torch.mm(e1.low, w.w1.T, out=g)
        low = d if self.same else self.scratch("ds low", rows, self.dim)
        scaled = self.scratch("ds scaled", rows, self.dim)
        m1, m2 = (self.scratch(f"mean {k}", rows, 1, wide=True) for k in range(2))
        sums = None if into is None else into.close_sums
        self.ops.close_bwd_(s, e1.full, d, *moments, w.w, w.d, w.gamma, d, low, scaled, m1, m2, sums)
        bias = None if into is None else into.b1
        hidden_kernels.product_backward(low, w.w2, h, w.b1, *moments, m1, m2, g, dh, bias)
        if into is not None:
            self._accumulate_product(into.out_g, scaled, g)
            self._accumulate_product(into.w1, dh, e1.low)
        self._add_product(d, dh, w.w1)
        return d
