"""MLP in: the first half of the edge MLP, g = GELU(e¹ W₁ᵀ + b₁) and its row moments (docs/math/mlp_in.md)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.schema import Written, declare
from gcahng.engine.stages.common import NORM_EPS, Edges, RowMoments, Stage, StageContext
from gcahng.engine.weights import EdgeGradients, EdgeWeights


class MlpInInputs(NamedTuple):
    """The product h = e¹ W₁ᵀ (T, 4D) in the dtype of products, and the bias (4D,)."""

    h: Tensor
    bias: Tensor


class MlpInOutputs(NamedTuple):
    """g (T, 4D), which may be h; mean and 1/σ (T, 1) of its rows."""

    g: Written
    mean: Written
    rstd: Written


class MlpInUpstream(NamedTuple):
    """dn (T, 4D), the gradient of the normalized rows."""

    dn: Tensor


class NormRows(NamedTuple):
    """What the backward of LayerNorm over the 4D hidden channels needs of each row (T, 1): mean and 1/σ of g, and the
    means over channels of dn and of n dn, n being the normalized row."""

    mean: Tensor
    rstd: Tensor
    mean_dn: Tensor
    mean_n_dn: Tensor


class MlpInGradients(NamedTuple):
    """g (T, 4D) again, and dh (T, 4D), which may be dn; db (4D,) is added to."""

    g: Written
    dh: Written
    db: Written | None


FORWARD = declare("mlp_in_fwd_", "mlp_in.forward", MlpInInputs, MlpInOutputs)
BACKWARD = declare("mlp_in_bwd_", "mlp_in.backward", MlpInInputs, MlpInUpstream, NormRows, MlpInGradients)


class MlpIn(Stage):
    """In plain torch."""

    def forward(
        self, w: EdgeWeights, e1: Edges, h: Tensor | None, moments: RowMoments | None
    ) -> tuple[Tensor, RowMoments]:
        """e¹ → g (T, 4D) in the dtype of products, and its row moments.

        Args:
            w: weights.
            e1: edges behind the gate.
            h: (T, 4D) receives, if given, what `backward` takes as h.
            moments: receives, if given, the row moments.
        """
        context = self.context
        product = torch.addmm(w.b1.to(context.compute), e1.low, w.w1.T)
        if h is not None:
            h.copy_(product)
        g = F.gelu(product)
        variance, mean = torch.var_mean(g.to(context.like.dtype), dim=1, correction=0, keepdim=True)
        found = RowMoments(mean, torch.rsqrt(variance + NORM_EPS))
        if moments is not None:
            moments.mean.copy_(found.mean)
            moments.rstd.copy_(found.rstd)
        return g, found

    def backward(
        self, w: EdgeWeights, e1: Edges, h: Tensor | None, ds: Tensor, rows: NormRows, into: EdgeGradients | None
    ) -> tuple[Tensor, Tensor]:
        """→ g (T, 4D) again, and dh (T, 4D), the gradient of the product.

        Args:
            w, e1: as in the forward.
            h: what it left there; None: the product is formed again.
            ds: (T, D) in the dtype of products, the gradient of the sums behind the second product.
            rows: moments and means of each row.
            into: where db₁ is added, if given.
        """
        if h is None:
            h = torch.addmm(w.b1.to(self.context.compute), e1.low, w.w1.T)
        g = F.gelu(h)
        dn = torch.mm(ds, w.w2)
        dg = (dn - rows.mean_dn - (g - rows.mean) * (rows.rstd * rows.mean_n_dn)) * rows.rstd
        dh = torch.ops.aten.gelu_backward(dg, h.to(dg.dtype))
        if into is not None:
            into.b1.add_(dh.sum(dim=0))
        return g, dh.to(self.context.compute)


class FusedMlpIn(MlpIn):
    """The products are the library's; what is between them is one op each way."""

    def forward(
        self, w: EdgeWeights, e1: Edges, h: Tensor | None, moments: RowMoments | None
    ) -> tuple[Tensor, RowMoments]:
        rows = e1.low.shape[0]
        g = self.context.scratch("g", rows, 4 * self.dim)
        moments = moments or RowMoments(*(self.context.wide(f"row {k}", rows, 1) for k in range(2)))
        self._forward(w, e1, h, MlpInOutputs(g, *moments))
        return g, moments

    def backward(
        self, w: EdgeWeights, e1: Edges, h: Tensor | None, ds: Tensor, rows: NormRows, into: EdgeGradients | None
    ) -> tuple[Tensor, Tensor]:
        g, dh = (self.context.scratch(slot, len(ds), 4 * self.dim) for slot in ("g", "dn"))
        if h is None:
            h = torch.mm(e1.low, w.w1.T, out=g)
        gradients = MlpInGradients(g, dh, None if into is None else into.b1)
        self._backward(w, ds, MlpInInputs(h, w.b1), rows, gradients)
        return g, dh

    def _forward(self, w: EdgeWeights, e1: Edges, h: Tensor | None, outputs: MlpInOutputs) -> None:
        """h, if given, receives the product."""
        h = torch.mm(e1.low, w.w1.T, out=outputs.g if h is None else h)
        self.ops(FORWARD, MlpInInputs(h, w.b1), outputs)

    def _backward(
        self, w: EdgeWeights, ds: Tensor, inputs: MlpInInputs, rows: NormRows, gradients: MlpInGradients
    ) -> None:
        torch.mm(ds, w.w2, out=gradients.dh)
        self.ops(BACKWARD, inputs, MlpInUpstream(gradients.dh), rows, gradients)


class TritonMlpIn(FusedMlpIn):
    """With the products in the kernels, for products in fp32, bf16 or fp16: what follows a product is done in its
    epilogue, before the result goes to memory."""

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        self._kernels = _kernels()

    def _forward(self, w: EdgeWeights, e1: Edges, h: Tensor | None, outputs: MlpInOutputs) -> None:
        self._kernels.product_forward(e1.low, w.w1, w.b1, h, outputs)

    def _backward(
        self, w: EdgeWeights, ds: Tensor, inputs: MlpInInputs, rows: NormRows, gradients: MlpInGradients
    ) -> None:
        self._kernels.product_backward(ds, w.w2, inputs, rows, gradients)


def _kernels() -> Any:
    from gcahng.kernels import mlp_in  # needs triton

    return mlp_in
