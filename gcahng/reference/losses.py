"""The losses of GCA-HNG on embeddings (K, C, D), view k of class a, and negatives (K, C, C, D) (paper section 3.3,
3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

L2_WEIGHT = 3e-3 * 0.25


def npair(views: Tensor) -> Tensor:
    """J_m: view 0 of every class is the anchor; for every other view, cross entropy of z₀ z_kᵀ, plus an L2 term."""
    num_views, classes, _ = views.shape
    target = torch.arange(classes, device=views.device)
    entropies = [F.cross_entropy(views[0] @ views[k].T, target) for k in range(1, num_views)]
    return torch.stack(entropies).mean() + L2_WEIGHT * views.square().sum() / classes


def synthetic_npair(views: Tensor, negatives: Tensor) -> Tensor:
    """J_syn, not yet weighted: every view in turn is the anchor, its own column holds the positive."""
    num_views, classes, _ = views.shape
    target = torch.arange(classes, device=views.device)
    own = target[:, None] == target[None, :]
    total = views.new_zeros(())
    for k in range(num_views):
        anchor, positive = views[k], views[(k + 1) % num_views]
        opponents = torch.where(own[..., None], positive[:, None], negatives[k])
        entropy = F.cross_entropy(torch.einsum("ad,acd->ac", anchor, opponents), target)
        norms = anchor.square().sum() / classes + opponents.square().sum() / classes**2
        total = total + entropy + L2_WEIGHT * norms
    return total / num_views


def negative_entropy(classifier: nn.Linear, negatives: Tensor, classes: Tensor) -> Tensor:
    """J_soft before its factor: mean cross entropy of the classifier on all K·C² entries, each against its class c.

    The classifier's own gradient is thrown away by the training step, so its weights are held fixed here.
    """
    bias = classifier.bias.detach()
    logits = F.linear(negatives, classifier.weight.detach(), bias)
    return F.cross_entropy(logits.flatten(0, -2), classes.expand(negatives.shape[:-1]).flatten())


def official_own_entries(num_views: int, order: Tensor) -> Tensor:
    """The entries whose similarity the authors' code zeroes: bool (K, C, C), in our order of classes.

    Their code indexes the flat (k, a, c) array as if it were (a, k, c). order (C,): each class's place among the
    classes of the batch by first appearance, which is the order that their arrays use.
    """
    classes = order.shape[0]
    index = torch.arange(classes, device=order.device)
    wrong = (index[:, None, None] == index).expand(classes, num_views, classes)
    return wrong.reshape(num_views, classes, classes)[:, order][:, :, order]


def own_entries(num_views: int, classes: int, device: torch.device) -> Tensor:
    """The entries a = c, which are no negatives: bool (K, C, C)."""
    return torch.eye(classes, dtype=torch.bool, device=device).expand(num_views, classes, classes)


def dissimilarity(views: Tensor, negatives: Tensor, zeroed: Tensor) -> Tensor:
    """J_sim: mean of 1 - cos(anchor, N) over all K·C² entries, the zeroed ones (bool (K, C, C)) counted as 0."""
    cosine = F.cosine_similarity(views[:, :, None], negatives, dim=-1)
    return (1 - cosine).masked_fill(zeroed, 0.0).mean()
