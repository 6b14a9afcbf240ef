"""J_sim: how similar synthetic negatives are to their anchors (paper section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def official_own_entries(num_views: int, order: Tensor) -> Tensor:
    """The entries whose similarity the authors' code zeroes.

    Their code indexes the flat (k, a, c) array as if it were (a, k, c).

    Args:
        num_views: samples of a class, K.
        order: each class's place among the batch's classes by first appearance (C,). Their arrays are in this order.

    Returns:
        (K, C, C) bool, with classes in ascending order.
    """
    classes = order.shape[0]
    index = torch.arange(classes, device=order.device)
    wrong = (index[:, None, None] == index).expand(classes, num_views, classes)
    return wrong.reshape(num_views, classes, classes)[:, order][:, :, order]


def own_entries(num_views: int, classes: int, device: torch.device) -> Tensor:
    """The entries a = c, which are no negatives, (K, C, C) bool."""
    return torch.eye(classes, dtype=torch.bool, device=device).expand(num_views, classes, classes)


def dissimilarity(views: Tensor, negatives: Tensor, zeroed: Tensor) -> Tensor:
    """J_sim: mean of 1 - cos(anchor, N) over all K·C² entries.

    Args:
        views: embeddings (K, C, D).
        negatives: N (K, C, C, D).
        zeroed: entries that count as 0, (K, C, C) bool.

    Returns:
        The mean, 0-dim.
    """
    cosine = F.cosine_similarity(views[:, :, None], negatives, dim=-1)
    return (1 - cosine).masked_fill(zeroed, 0.0).mean()
