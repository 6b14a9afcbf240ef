"""Cross entropy of the classifier on negatives, J_soft, with its gradient (docs/math/cross_entropy.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.schema import Written, declare
from gcahng.engine.stages.common import Stage


class CrossEntropyInputs(NamedTuple):
    """Logits without bias (R, M), bias (M,), labels (R,) int64; scale: of the gradient."""

    logits: Tensor
    bias: Tensor
    labels: Tensor
    scale: float


class CrossEntropyOutputs(NamedTuple):
    """loss (R,); d (R, M): scale times its gradient, which may be the logits."""

    loss: Written
    d: Written | None


FORWARD = declare("cross_entropy_", "cross_entropy.forward", CrossEntropyInputs, CrossEntropyOutputs)


class CrossEntropy(Stage):
    """In plain torch."""

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (R, D) and weight (M, D) → the classifier's logits without its bias (R, M)."""
        return torch.mm(x, weight.T)

    def forward(self, inputs: CrossEntropyInputs, want: bool) -> tuple[Tensor, Tensor | None]:
        """→ each row's cross entropy (R,) in the bias's dtype and, if wanted, scale times its gradient (R, M) in the
        logits'. The logits are lost."""
        logits, bias, labels, scale = inputs
        log_p = torch.log_softmax(logits.to(bias.dtype).add_(bias), dim=1)
        at = labels[:, None]
        loss = -log_p.gather(1, at)[:, 0]
        if not want:
            return loss, None
        p = log_p.exp_()
        p.scatter_add_(1, at, torch.full_like(loss, -1)[:, None])
        return loss, p.mul_(scale).to(logits.dtype)


class FusedCrossEntropy(CrossEntropy):
    """The product is the library's; what follows it is one op."""

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, weight.T, out=self.context.scratch("logits", len(x), len(weight), x.dtype))

    def forward(self, inputs: CrossEntropyInputs, want: bool) -> tuple[Tensor, Tensor | None]:
        loss = inputs.bias.new_empty(len(inputs.logits))
        d = inputs.logits if want else None
        self.ops(FORWARD, inputs, CrossEntropyOutputs(loss, d))
        return loss, d
