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
    """What both directions take.

    Attributes:
        h: product e¹ W₁ᵀ (T, 4D), in the dtype of products.
        bias: b₁ (4D,).
    """

    h: Tensor
    bias: Tensor


class MlpInOutputs(NamedTuple):
    """What the forward writes.

    Attributes:
        g: GELU(h + b₁) (T, 4D), which may be the memory of h.
        mean: mean of each row of g (T, 1).
        rstd: its 1/σ (T, 1).
    """

    g: Written
    mean: Written
    rstd: Written


class MlpInUpstream(NamedTuple):
    """What comes down to the backward.

    Attributes:
        dn: gradient of the normalized rows (T, 4D).
    """

    dn: Tensor


class NormRows(NamedTuple):
    """What the backward of the LayerNorm over the 4D hidden channels needs of each row, with n the normalized row.

    Attributes:
        mean: mean of g (T, 1).
        rstd: 1/σ of g (T, 1).
        mean_dn: mean of dn over the channels (T, 1).
        mean_n_dn: mean of n dn over the channels (T, 1).
    """

    mean: Tensor
    rstd: Tensor
    mean_dn: Tensor
    mean_n_dn: Tensor


class MlpInGradients(NamedTuple):
    """What the backward writes.

    Attributes:
        g: GELU(h + b₁) (T, 4D), formed again.
        dh: gradient of the product (T, 4D), which may be the memory of dn.
        db: gradient of the bias (4D,), which is added to; None if it is not wanted.
    """

    g: Written
    dh: Written
    db: Written | None


declare("mlp_in_fwd_", "mlp_in.forward", MlpInInputs, MlpInOutputs)
declare("mlp_in_bwd_", "mlp_in.backward", MlpInInputs, MlpInUpstream, NormRows, MlpInGradients)


class MlpIn(Stage):
    """The first half of the edge MLP in plain torch."""

    def forward(
        self, w: EdgeWeights, e1: Edges, h: Tensor | None, moments: RowMoments | None
    ) -> tuple[Tensor, RowMoments]:
        """Computes the hidden channels.

        Args:
            w: weights.
            e1: e¹, the edges behind the gate.
            h: memory (T, 4D) for what `backward` takes as h; None if it is not saved.
            moments: memory for the row moments; None if they are not saved.

        Returns:
            g (T, 4D) in the dtype of products, and its row moments.
        """
        context = self.context
        product = torch.addmm(w.b1.to(context.compute), e1.low, w.w1.T)
        if h is not None:
            h.copy_(product)
        g = F.gelu(product)
        variance, mean = torch.var_mean(g.to(context.like.dtype), dim=1, correction=0, keepdim=True)
        of_rows = RowMoments(mean, torch.rsqrt(variance + NORM_EPS))
        if moments is not None:
            moments.mean.copy_(of_rows.mean)
            moments.rstd.copy_(of_rows.rstd)
        return g, of_rows

    def backward(
        self, w: EdgeWeights, e1: Edges, h: Tensor | None, ds: Tensor, rows: NormRows, into: EdgeGradients | None
    ) -> tuple[Tensor, Tensor]:
        """Differentiates the hidden channels.

        Args:
            w: as in the forward.
            e1: as in the forward.
            h: what the forward saved; None if the product is to be formed again.
            ds: gradient of the sums behind the second product (T, D), in the dtype of products.
            rows: moments and means of each row.
            into: the weights' gradients, of which that of b₁ is added to; None if they are not wanted.

        Returns:
            g (T, 4D), formed again, and the gradient of the product (T, 4D).
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
    """The products are the math library's; what is between them is one fused op each way."""

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
            h = torch.mm(e1.low, self.transposed(w.w1), out=g)
        gradients = MlpInGradients(g, dh, None if into is None else into.b1)
        self._backward(w, ds, MlpInInputs(h, w.b1), rows, gradients)
        return g, dh

    def _forward(self, w: EdgeWeights, e1: Edges, h: Tensor | None, outputs: MlpInOutputs) -> None:
        """Forms the product, in `h` if it is to be saved, and what follows from it."""
        h = torch.mm(e1.low, self.transposed(w.w1), out=outputs.g if h is None else h)
        self.ops.mlp_in_fwd_(MlpInInputs(h, w.b1), outputs)

    def _backward(
        self, w: EdgeWeights, ds: Tensor, inputs: MlpInInputs, rows: NormRows, gradients: MlpInGradients
    ) -> None:
        """Forms the gradient of the normalized rows, and what follows from it."""
        torch.mm(ds, w.w2, out=gradients.dh)
        self.ops.mlp_in_bwd_(inputs, MlpInUpstream(gradients.dh), rows, gradients)


class TritonMlpIn(FusedMlpIn):
    """The products are the kernels', in fp32, bf16 or fp16.

    What follows a product is done in its epilogue, before the result goes to memory.
    """

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
