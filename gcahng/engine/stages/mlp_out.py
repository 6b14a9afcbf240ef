"""MLP out: the second half of the edge MLP (docs/math/mlp_out.md).

s = (g W₂'ᵀ − μ w)/σ + d + e¹ folds the LayerNorm over the hidden channels into the product. The edges that leave are
LayerNorm(GELU(s)).
"""

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
    """What the forward takes.

    Attributes:
        product: g W₂'ᵀ (T, D), in the dtype of products.
        e1: the residual e¹ (T, D).
        moments: row moments of g.
        fold: the LayerNorm over the hidden channels.
        norm: the norm that the edges leave by.
    """

    product: Tensor
    e1: Tensor
    moments: RowMoments
    fold: Fold
    norm: NormWeights


class MlpOutOutputs(NamedTuple):
    """What the forward writes.

    Attributes:
        s: pre-norm sums (T, D).
        full: LayerNorm(GELU(s)) (T, D) in the accumulating dtype; None if it is not wanted.
        low: the same in the dtype of products; None if it is not wanted.
    """

    s: Written
    full: Written | None
    low: Written | None


class MlpOutReplay(NamedTuple):
    """What the backward takes.

    Attributes:
        s: pre-norm sums (T, D).
        e1: the residual e¹ (T, D).
        dy: gradient of LayerNorm(GELU(s)) (T, D).
        moments: row moments of g.
        fold: the LayerNorm over the hidden channels.
        gamma: γ (D,) of the norm that the edges leave by.
    """

    s: Tensor
    e1: Tensor
    dy: Tensor
    moments: RowMoments
    fold: Fold
    gamma: Tensor


class MlpOutGradients(NamedTuple):
    """What the backward writes.

    Attributes:
        ds: gradient of s (T, D), which may be the memory of dy.
        low: ds (T, D) in the dtype of products.
        scaled: ds/σ (T, D) in the dtype of products.
        mean_dn: see NormRows (T, 1).
        mean_n_dn: see NormRows (T, 1).
        sums: EdgeGradients.mlp_out_sums (4, D), which are added to; None if they are not wanted.
    """

    ds: Written
    low: Written
    scaled: Written
    mean_dn: Written
    mean_n_dn: Written
    sums: Written | None


declare("mlp_out_fwd_", "mlp_out.forward", MlpOutInputs, MlpOutOutputs)
declare("mlp_out_bwd_", "mlp_out.backward", MlpOutReplay, MlpOutGradients)


class OutGradient(NamedTuple):
    """What the backward returns.

    Attributes:
        ds: gradient of s (T, D), which is also that of the residual.
        low: ds (T, D) in the dtype of products.
        scaled: ds/σ (T, D) in the dtype of products; None if the weights' gradients are not wanted.
        rows: what mlp_in's backward needs of each row.
    """

    ds: Tensor
    low: Tensor
    scaled: Tensor | None
    rows: NormRows


class MlpOut(Stage):
    """The second half of the edge MLP in plain torch.

    Args:
        context: what all stages of the pass work with.
        norm_gelu: the norm that the edges leave by.
    """

    def __init__(self, context: StageContext, norm_gelu: NormGelu) -> None:
        super().__init__(context)
        self._norm_gelu = norm_gelu

    def forward(
        self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, s: Tensor | None, slot: str
    ) -> tuple[Tensor, Edges]:
        """Computes the edges that leave.

        Args:
            w: weights.
            e1: e¹, the edges behind the gate.
            g: hidden channels (T, 4D).
            moments: their row moments.
            s: memory (T, D) for the pre-norm sums; None if they are not saved. What goes on is what was stored there,
                in its precision.
            slot: a name for the memory of the edges (see StageContext.scratch).

        Returns:
            The pre-norm sums s (T, D), and the edges LayerNorm(GELU(s)).
        """
        sums = torch.mm(g, w.w2.T).to(self.context.like.dtype)
        sums.addcmul_(moments.mean, w.w, value=-1).mul_(moments.rstd).add_(w.d).add_(self.context.full(e1.full))
        if s is not None:
            s.copy_(sums)
            sums = s.to(sums.dtype)
        elif self.context.narrow:
            sums = self.context.full(self.context.rounded(sums))
        return sums, self._norm_gelu.forward(w.norm, sums, slot)

    def backward(
        self, w: EdgeWeights, e1: Edges, s: Tensor, dy: Tensor, moments: RowMoments, into: EdgeGradients | None
    ) -> OutGradient:
        """Differentiates the edges that left.

        The two row means that LayerNorm's gradient needs follow from D-vectors: n·dn = ds·(O − d) with
        O − d = s − e¹ − d.

        Args:
            w: as in the forward.
            e1: as in the forward.
            s: the pre-norm sums (T, D).
            dy: gradient of the edges that left (T, D), which may be overwritten.
            moments: as in the forward.
            into: the weights' gradients, of which those of the norm, Σ ds and Σ (ds/σ) μ are added to; None if they are
                not wanted.
        """
        full, s = self.context.full, self.context.full(s)
        ds = norm_gelu_backward(w.norm, s, full(dy), None if into is None else into.norm)
        mean, rstd = moments
        mean_dn = (ds @ w.w)[:, None] / (4 * self.dim)
        mean_n_dn = (ds * (s - full(e1.full) - w.d)).sum(dim=1, keepdim=True) / (4 * self.dim)
        low, scaled, rows = ds.to(self.context.compute), None, NormRows(mean, rstd, mean_dn, mean_n_dn)
        if into is not None:
            scaled = ds * rstd
            into.out_mean.add_((scaled * mean).sum(dim=0))
            into.out.add_(ds.sum(dim=0))
            scaled = scaled.to(self.context.compute)
        # Narrow: ds goes on where it lies, and `low` is then still needed as it is.
        return OutGradient(ds.to(low.dtype, copy=True) if self.context.narrow else ds, low, scaled, rows)

    def norm_backward(
        self, norm: NormWeights, y: Tensor, d: Tensor, into: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Differentiates N(y) = LayerNorm(GELU(y)) of rows that have no MLP before them.

        Args:
            norm: parameters of the LayerNorm.
            y: (R, D).
            d: gradient of N(y) (R, D).
            into: (4, D): gradients of γ and β and the sum of the result's rows, which are added to; the last row has no
                meaning.
            out: memory for the result (R, D), which may be that of d.

        Returns:
            The gradient of y (R, D), in the accumulating dtype and in that of products.
        """
        dy = norm_gelu_backward(norm, y, d, NormWeights(into[0], into[1]))
        into[2] += dy.sum(dim=0)
        out.copy_(dy)
        return out, out.to(self.context.compute)


class FusedMlpOut(MlpOut):
    """The product is the math library's; what follows it is one fused op each way."""

    def forward(
        self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, s: Tensor | None, slot: str
    ) -> tuple[Tensor, Edges]:
        context = self.context
        narrowed = s is not None and s.dtype is not context.edges_dtype
        sums = context.edge_scratch("s", len(g)) if s is None or narrowed else s
        if narrowed:  # what goes on is what was stored, in its precision
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
        low = dy if context.same or context.narrow else context.scratch("ds low", count, self.dim)
        scaled = context.scratch("ds scaled", count, self.dim)
        means = tuple(context.wide(f"mean {k}", count, 1) for k in range(2))
        replay = MlpOutReplay(s, e1.full, dy, moments, w.fold, w.gamma)
        gradients = MlpOutGradients(dy, low, scaled, *means, None if into is None else into.mlp_out_sums)
        self.ops.mlp_out_bwd_(replay, gradients)
        return OutGradient(dy, low, scaled, NormRows(*moments, *means))

    def norm_backward(
        self, norm: NormWeights, y: Tensor, d: Tensor, into: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This is the op's backward with hidden rows whose mean is 0 and σ is 1, and with a fold of zeros."""
        context, rows = self.context, len(y)
        zeros, ones, nothing = context.constant(("no mlp", *y.shape, y.dtype, y.device), lambda: _no_mlp(y))
        low = out if context.same else context.scratch("d norm low", rows, self.dim)
        means = tuple(context.wide(f"d norm mean {k}", rows, 1) for k in range(2))
        replay = MlpOutReplay(y, y, d, RowMoments(zeros, ones), Fold(nothing, nothing), norm.gamma)
        scaled = context.scratch("d norm scaled", rows, self.dim)
        self.ops.mlp_out_bwd_(replay, MlpOutGradients(out, low, scaled, *means, into))
        return out, low

    def _forward(self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, s: Tensor, e: Edges | None) -> None:
        """Writes the pre-norm sums, and the edges that leave unless e is None."""
        product = torch.mm(g, self.transposed(w.w2), out=self.context.scratch("product", len(g), self.dim))
        outputs = MlpOutOutputs(s, None, None) if e is None else MlpOutOutputs(s, *self.context.out(e))
        self.ops.mlp_out_fwd_(MlpOutInputs(product, e1.full, moments, w.fold, w.norm), outputs)


class TritonMlpOut(FusedMlpOut):
    """The product is the kernel's, in fp32, bf16 or fp16.

    The norm is a kernel of its own, since a block of the product does not hold whole rows.
    """

    def __init__(self, context: StageContext, norm_gelu: NormGelu) -> None:
        super().__init__(context, norm_gelu)
        self._kernels = _kernels()

    def _forward(self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, s: Tensor, e: Edges | None) -> None:
        self._kernels.product_forward(g, w.w2, e1.full, moments, w.fold, s)
        if e is not None:
            self._norm_gelu.write(w.norm, s, e)


def _no_mlp(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros and ones (R, 1), and zeros (D,), for rows like these (R, D)."""
    rows, dim = like.shape
    return like.new_zeros(rows, 1), like.new_ones(rows, 1), like.new_zeros(dim)


def _kernels() -> Any:
    from gcahng.kernels import mlp_out  # needs triton

    return mlp_out
