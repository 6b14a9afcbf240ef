"""J_soft: cross entropy of the classifier on synthetic negatives (paper section 3.4)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def negative_entropy(classifier: nn.Linear, negatives: Tensor, classes: Tensor) -> Tensor:
    """J_soft before its factor: mean cross entropy of the classifier on all K·C² entries, each against its class c.

    A training step does not use the classifier's own gradient here, so that its weights are held fixed.

    Args:
        classifier: from D channels to M classes.
        negatives: (K, C, C, D).
        classes: labels of the batch's classes (C,).

    Returns:
        The mean, 0-dim.
    """
    bias = classifier.bias.detach()
    logits = F.linear(negatives, classifier.weight.detach(), bias)
    return F.cross_entropy(logits.flatten(0, -2), classes.expand(negatives.shape[:-1]).flatten())
