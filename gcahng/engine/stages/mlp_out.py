"""MLP out: the second half of the edge MLP. s = (g W₂'ᵀ − μ w)/σ + d + e¹ folds the LayerNorm over the hidden channels
into the product; the edges that leave are LayerNorm(GELU(s)) (docs/math/mlp_out.md)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcahng.engine.schema import Written, declare
from gcahng.engine.stages.common import Edges, RowMoments, Stage, StageContext
from gcahng.engine.stages.mlp_in import NormRows
from gcahng.engine.stages.norm_gelu import NormGelu, norm_gelu_backward
from gcahng.engine.weights import EdgeGradients, EdgeWeights, Fold, NormWeights


class MlpOutInputs(NamedTuple):
    """The product g W₂'ᵀ (T, D) in the dtype of products, and the residual e1 (T, D)."""

    product: Tensor
    e1: Tensor
    moments: RowMoments
    fold: Fold
    norm: NormWeights


class MlpOutOutputs(NamedTuple):
    """Pre-norm sums s (T, D), and where given LayerNorm(GELU(s)) in the accumulating dtype and in that of products."""

    s: Written
    full: Written | None
    low: Written | None


class MlpOutReplay(NamedTuple):
    """What the backward needs: s, e1 and dy, the gradient of LayerNorm(GELU(s)) (T, D); gamma (D,) of the norm."""

    s: Tensor
    e1: Tensor
    dy: Tensor
    moments: RowMoments
    fold: Fold
    gamma: Tensor


class MlpOutGradients(NamedTuple):
    """ds (T, D), which may be dy; in the dtype of products ds as low, and ds/σ as scaled; the means of NormRows; sums
    (4, D) of EdgeGradients, which are added to."""

    ds: Written
    low: Written
    scaled: Written
    mean_dn: Written
    mean_n_dn: Written
    sums: Written | None


FORWARD = declare("mlp_out_fwd_", "mlp_out.forward", MlpOutInputs, MlpOutOutputs)
BACKWARD = declare("mlp_out_bwd_", "mlp_out.backward", MlpOutReplay, MlpOutGradients)


class OutGradient(NamedTuple):
    """What mlp_out's backward hands on.

    Attributes:
        ds: gradient of s (T, D), which is also the residual's.
        low: ds in the dtype of products.
        scaled: ds/σ in the dtype of products; None where the weights' gradients are not wanted.
        rows: what mlp_in's backward needs of each row.
    """

    ds: Tensor
    low: Tensor
    scaled: Tensor | None
    rows: NormRows


class MlpOut(Stage):
    """In plain torch."""

    def __init__(self, context: StageContext, norm_gelu: NormGelu) -> None:
        super().__init__(context)
        self._norm_gelu = norm_gelu

    def forward(
        self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, s: Tensor | None, slot: str
    ) -> tuple[Tensor, Edges]:
        """g (T, 4D) → s (T, D), and the edges LayerNorm(GELU(s)).

        Args:
            w: weights.
            e1: edges behind the gate.
            g, moments: what mlp_in made of them.
            s: (T, D) receives s, if given; s is then as it was stored.
            slot: a name for the memory of the edges.
        """
        found = torch.mm(g, w.w2.T).to(self.context.like.dtype)
        found.addcmul_(moments.mean, w.w, value=-1).mul_(moments.rstd).add_(w.d).add_(e1.full)
        if s is not None:
            s.copy_(found)
            found = s.to(found.dtype)
        return found, self._norm_gelu.forward(w.norm, found, slot)

    def backward(
        self, w: EdgeWeights, e1: Edges, s: Tensor, dy: Tensor, moments: RowMoments, into: EdgeGradients | None
    ) -> OutGradient:
        """dy (T, D), the gradient of LayerNorm(GELU(s)) → ds and what follows from it. dy may be lost.

        The two row means that LayerNorm's gradient needs are those of D-vectors: n·dn = ds·(O − d) with
        O − d = s − e¹ − d.

        Args:
            w, e1, s, moments: as in the forward.
            dy: gradient of the edges that left.
            into: where the gradients of the norm, Σ ds and Σ (ds/σ) μ are added, if given.
        """
        ds = norm_gelu_backward(w.norm, s, dy, None if into is None else into.norm)
        mean, rstd = moments
        mean_dn = (ds @ w.w)[:, None] / (4 * self.dim)
        mean_n_dn = (ds * (s - e1.full - w.d)).sum(dim=1, keepdim=True) / (4 * self.dim)
        low, scaled = ds.to(self.context.compute), None
        if into is not None:
            scaled = ds * rstd
            into.out_mean.add_((scaled * mean).sum(dim=0))
            into.out.add_(ds.sum(dim=0))
            scaled = scaled.to(self.context.compute)
        return OutGradient(ds, low, scaled, NormRows(mean, rstd, mean_dn, mean_n_dn))


class FusedMlpOut(MlpOut):
    """The product is the library's; what follows it is one op each way."""

    def forward(
        self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, s: Tensor | None, slot: str
    ) -> tuple[Tensor, Edges]:
        context = self.context
        narrowed = s is not None and s.dtype is not context.like.dtype
        sums = context.wide("s", len(g), self.dim) if s is None or narrowed else s
        if narrowed:  # what goes on is what was stored
            self._forward(w, e1, g, moments, sums, None)
            sums.copy_(s.copy_(sums))
            return sums, self._norm_gelu.forward(w.norm, sums, slot)
        e = context.edge_room(slot, len(g))
        self._forward(w, e1, g, moments, sums, e)
        return sums, e

    def backward(
        self, w: EdgeWeights, e1: Edges, s: Tensor, dy: Tensor, moments: RowMoments, into: EdgeGradients | None
    ) -> OutGradient:
        context, count = self.context, len(s)
        low = dy if context.same else context.scratch("ds low", count, self.dim)
        scaled = context.scratch("ds scaled", count, self.dim)
        means = tuple(context.wide(f"mean {k}", count, 1) for k in range(2))
        replay = MlpOutReplay(s, e1.full, dy, moments, w.fold, w.gamma)
        gradients = MlpOutGradients(dy, low, scaled, *means, None if into is None else into.mlp_out_sums)
        self.ops(BACKWARD, replay, gradients)
        return OutGradient(dy, low, scaled, NormRows(*moments, *means))

    def _forward(self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, s: Tensor, e: Edges | None) -> None:
        """s, and the edges that leave if given."""
        product = torch.mm(g, w.w2.T, out=self.context.scratch("product", len(g), self.dim))
        outputs = MlpOutOutputs(s, None, None) if e is None else MlpOutOutputs(s, e.full, self.context.low(e))
        self.ops(FORWARD, MlpOutInputs(product, e1.full, moments, w.fold, w.norm), outputs)


class TritonMlpOut(FusedMlpOut):
    """With the product in the kernel, for products in fp32, bf16 or fp16. The norm is a kernel of its own: a block of
    the product does not hold whole rows."""

    def __init__(self, context: StageContext, norm_gelu: NormGelu) -> None:
        super().__init__(context, norm_gelu)
        self._kernels = _kernels()

    def _forward(self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, s: Tensor, e: Edges | None) -> None:
        self._kernels.product_forward(g, w.w2, e1.full, moments, w.fold, s)
        if e is not None:
            self._norm_gelu.write(w.norm, s, e)


def _kernels() -> Any:
    from gcahng.kernels import mlp_out  # needs triton

    return mlp_out
