"""What the generator's losses make of a tile's negatives: their class by the classifier, their likeness to the anchor.
Values and gradients are formed together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcahng.engine.workspace import Workspace

SMALLEST_NORM = 1e-8


class TorchJudge:
    """In plain torch."""

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (R, D) and weight (M, D) → the classifier's logits without its bias (R, M)."""
        return torch.mm(x, weight.T)

    def cross_entropy(
        self, logits: Tensor, bias: Tensor, labels: Tensor, scale: float, want: bool
    ) -> tuple[Tensor, Tensor | None]:
        """logits (R, M), bias (M,), labels (R,) → the rows' cross entropy (R,) in the bias's dtype, and if wanted scale
        times its gradient (R, M) in the logits'. The logits are lost."""
        log_p = torch.log_softmax(logits.to(bias.dtype).add_(bias), dim=1)
        at = labels[:, None]
        loss = -log_p.gather(1, at)[:, 0]
        if not want:
            return loss, None
        p = log_p.exp_()
        p.scatter_add_(1, at, torch.full_like(loss, -1)[:, None])
        return loss, p.mul_(scale).to(logits.dtype)

    def similarity(
        self, anchors: Tensor, node: Tensor, negatives: Tensor, counted: Tensor, scale: float, dn: Tensor | None
    ) -> Tensor:
        """1 - cos(a, N) of the rows that count, else 0: (N,). anchors (n, D), of which node (N,) says whose a row's is;
        negatives (N, D); counted (N,) bool; scale times the gradient is added to dn (N, D) if given."""
        a, counted = anchors[node], counted[:, None].to(negatives.dtype)
        norm_a = a.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
        norm_n = negatives.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
        cosine = (a * negatives).sum(dim=1, keepdim=True) / (norm_a * norm_n)
        if dn is not None:
            along = counted * (scale / norm_n)
            dn.addcmul_(along / norm_a, a, value=-1).addcmul_(along * cosine / norm_n, negatives)
        return ((1 - cosine) * counted)[:, 0]


class FusedJudge(TorchJudge):
    """As fused ops (see gcahng.engine.fused.stage_ops)."""

    def __init__(self, workspace: Workspace, ops: Any) -> None:
        self.workspace, self.ops = workspace, ops

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, weight.T, out=self.workspace.get("logits", x.shape[0], weight.shape[0], x))

    def cross_entropy(
        self, logits: Tensor, bias: Tensor, labels: Tensor, scale: float, want: bool
    ) -> tuple[Tensor, Tensor | None]:
        loss = bias.new_empty(logits.shape[0])
        self.ops.cross_entropy_(logits, bias, labels, scale, loss, logits if want else None)
        return loss, logits if want else None

    def similarity(
        self, anchors: Tensor, node: Tensor, negatives: Tensor, counted: Tensor, scale: float, dn: Tensor | None
    ) -> Tensor:
        loss = negatives.new_empty(negatives.shape[0])
        self.ops.similarity_(anchors, node, negatives, counted, scale, loss, dn)
        return loss
