"""J_soft: cross entropy of the classifier on negatives, with its gradient (docs/math/cross_entropy.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.schema import Written, declare
from gcahng.engine.stages.common import Stage

LOGITS_AT_ONCE = 1 << 22  # so many of the negatives' logits exist at once


class CrossEntropyInputs(NamedTuple):
    """What the loss is formed of.

    Attributes:
        logits: the classifier's logits without its bias (R, M), in the dtype of products.
        bias: its bias (M,), in the accumulating dtype.
        labels: (R,) int64.
        scale: what the gradient is multiplied with.
    """

    logits: Tensor
    bias: Tensor
    labels: Tensor
    scale: float


class CrossEntropyOutputs(NamedTuple):
    """What the op writes.

    Attributes:
        loss: cross entropy of each row (R,).
        d: scale times its gradient (R, M), which may be the memory of the logits.
    """

    loss: Written
    d: Written | None


declare("cross_entropy_", "cross_entropy.forward", CrossEntropyInputs, CrossEntropyOutputs)


class CrossEntropy(Stage):
    """The loss in plain torch."""

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """The classifier's logits without its bias (R, M), for rows x (R, D) and weight (M, D)."""
        return torch.mm(x, weight.T)

    def forward(self, inputs: CrossEntropyInputs, loss: Tensor, want: bool) -> Tensor | None:
        """Computes the loss and its gradient. The logits may be overwritten.

        Args:
            inputs: what the loss is formed of.
            loss: each row's cross entropy (R,) in the bias's dtype, which is written.
            want: whether the gradient is wanted.

        Returns:
            scale times the gradient (R, M) in the logits' dtype, or None.
        """
        logits, bias, labels, scale = inputs
        log_p = torch.log_softmax(logits.to(bias.dtype).add_(bias), dim=1)
        column = labels[:, None]
        torch.neg(log_p.gather(1, column)[:, 0], out=loss)
        if not want:
            return None
        p = log_p.exp_()
        p.scatter_add_(1, column, torch.full_like(loss, -1)[:, None])
        return p.mul_(scale).to(logits.dtype)


class FusedCrossEntropy(CrossEntropy):
    """The product is the math library's; what follows it is one fused op."""

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, self.transposed(weight), out=self.context.scratch("logits", len(x), len(weight), x.dtype))

    def forward(self, inputs: CrossEntropyInputs, loss: Tensor, want: bool) -> Tensor | None:
        d = inputs.logits if want else None
        self.ops.cross_entropy_(inputs, CrossEntropyOutputs(loss, d))
        return d
