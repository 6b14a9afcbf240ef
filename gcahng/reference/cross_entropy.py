"""J_soft: cross entropy of the classifier on synthetic negatives (paper section 3.4)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def negative_entropy(classifier: nn.Linear, negatives: Tensor, classes: Tensor) -> Tensor:
    """J_soft before its factor: mean cross entropy of the classifier on all K·C² entries, each against its class c.

    The classifier's own gradient is thrown away by the training step, so its weights are held fixed here.
    """
    bias = classifier.bias.detach()
    logits = F.linear(negatives, classifier.weight.detach(), bias)
    return F.cross_entropy(logits.flatten(0, -2), classes.expand(negatives.shape[:-1]).flatten())
