"""LayerNorm(GELU(·)), which is behind the gate and behind the edge MLP (docs/math/norm_gelu.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.schema import declare
from gcahng.engine.stages.common import NORM_EPS, Edges, EdgesOut, Stage
from gcahng.engine.weights import NormWeights


class NormGeluInputs(NamedTuple):
    """What the op takes.

    Attributes:
        t: pre-norm sums (T, D).
        norm: parameters of the LayerNorm.
    """

    t: Tensor
    norm: NormWeights


declare("norm_gelu_", "norm_gelu.forward", NormGeluInputs, EdgesOut)


class NormGelu(Stage):
    """The norm in plain torch."""

    def forward(self, norm: NormWeights, t: Tensor, slot: str) -> Edges:
        """Computes LayerNorm(GELU(t)) (T, D).

        Args:
            norm: parameters of the LayerNorm.
            t: pre-norm sums (T, D).
            slot: a name for the memory of the result (see StageContext.scratch).
        """
        return self.context.edges(self._of(norm, self.context.full(t)))

    def of_nodes(self, norm: NormWeights, t: Tensor, slot: str) -> Edges:
        """Computes LayerNorm(GELU(t)) of node tensors (n, D), in both dtypes; arguments as those of `forward`."""
        full = self._of(norm, t)
        return Edges(full, full.to(self.context.compute))

    def _of(self, norm: NormWeights, t: Tensor) -> Tensor:
        return F.layer_norm(F.gelu(t), (self.dim,), norm.gamma, norm.beta, NORM_EPS)


class FusedNormGelu(NormGelu):
    """The norm as one fused op. Its backward is part of those of `gate` and `mlp_out`."""

    def forward(self, norm: NormWeights, t: Tensor, slot: str) -> Edges:
        e = self.context.edge_room(slot, t.shape[0])
        self.write(norm, t, e)
        return e

    def of_nodes(self, norm: NormWeights, t: Tensor, slot: str) -> Edges:
        e = self.context.node_room(slot, t.shape[0])
        self.ops.norm_gelu_(NormGeluInputs(t, norm), EdgesOut(e.full, None if self.context.same else e.low))
        return e

    def write(self, norm: NormWeights, t: Tensor, e: Edges) -> None:
        """Does what `forward` does, and writes the result to e."""
        self.ops.norm_gelu_(NormGeluInputs(t, norm), self.context.out(e))


def norm_gelu_backward(norm: NormWeights, t: Tensor, dy: Tensor, into: NormWeights | None) -> Tensor:
    """Differentiates LayerNorm(GELU(t)) in plain torch.

    Args:
        norm: as in the forward.
        t: as in the forward.
        dy: gradient of the result (T, D).
        into: gradients of γ and β (D,), which are added to; None if they are not wanted.

    Returns:
        The gradient of t (T, D).
    """
    g = F.gelu(t)
    variance, mean = torch.var_mean(g, dim=1, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + NORM_EPS)
    normalized = g.sub_(mean).mul_(rstd)
    if into is not None:
        into.gamma.add_((dy * normalized).sum(dim=0))
        into.beta.add_(dy.sum(dim=0))
    dn = dy * norm.gamma
    along = (dn * normalized).mean(dim=1, keepdim=True)
    dn.sub_(dn.mean(dim=1, keepdim=True)).sub_(normalized.mul_(along)).mul_(rstd)
    return torch.ops.aten.gelu_backward(dn, t)
