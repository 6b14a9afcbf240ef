"""Norm of stored sums: LayerNorm(GELU(·)), behind the gate and behind the edge MLP (docs/math/norm_gelu.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.schema import declare
from gcahng.engine.stages.common import NORM_EPS, Edges, EdgesOut, Stage
from gcahng.engine.weights import NormWeights


class NormGeluInputs(NamedTuple):
    """Pre-norm sums t (T, D)."""

    t: Tensor
    norm: NormWeights


FORWARD = declare("norm_gelu_", "norm_gelu.forward", NormGeluInputs, EdgesOut)


class NormGelu(Stage):
    """In plain torch."""

    def forward(self, norm: NormWeights, t: Tensor, slot: str) -> Edges:
        """t (T, D) → LayerNorm(GELU(t)) (T, D)."""
        return self.context.edges(F.layer_norm(F.gelu(t), (self.dim,), norm.gamma, norm.beta, NORM_EPS))


class FusedNormGelu(NormGelu):
    """As one op. Its backward is part of those of `gate` and `mlp_out`."""

    def forward(self, norm: NormWeights, t: Tensor, slot: str) -> Edges:
        e = self.context.edge_room(slot, t.shape[0])
        self.write(norm, t, e)
        return e

    def write(self, norm: NormWeights, t: Tensor, e: Edges) -> None:
        """`forward` into memory that is there."""
        self.ops(FORWARD, NormGeluInputs(t, norm), self.context.out(e))


def norm_gelu_backward(norm: NormWeights, t: Tensor, dy: Tensor, into: NormWeights | None) -> Tensor:
    """dy (T, D) → the gradient of the pre-norm sums t (T, D), in plain torch.

    Args:
        norm: of the forward.
        t: its input.
        dy: gradient of its output.
        into: sums (D,) to which dγ and dβ are added, if given.
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
