"""The N-pair losses of GCA-HNG, on real samples and on synthetic negatives (paper section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

L2_WEIGHT = 3e-3 * 0.25


def npair(views: Tensor) -> Tensor:
    """J_m: cross entropy of z₀ z_kᵀ against the classes, its mean over the views k > 0, and an L2 term.

    Args:
        views: embeddings (K, C, D), view k of class a. View 0 of each class is its anchor.

    Returns:
        The loss, 0-dim.
    """
    num_views, classes, _ = views.shape
    target = torch.arange(classes, device=views.device)
    entropies = [F.cross_entropy(views[0] @ views[k].T, target) for k in range(1, num_views)]
    return torch.stack(entropies).mean() + L2_WEIGHT * views.square().sum() / classes


def synthetic_npair(views: Tensor, negatives: Tensor) -> Tensor:
    """J_syn, not yet weighted. Every view is the anchor in turn, and its own class's column holds the positive.

    Args:
        views: embeddings (K, C, D).
        negatives: N (K, C, C, D).

    Returns:
        The loss, 0-dim.
    """
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
