"""Clouds of points, one for each class: a small data set on which every integration trains."""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES, DIM, VIEWS = 6, 16, 3
EACH, CHANNELS = 8, 8  # points of a class, and channels of a point


def clouds() -> tuple[Tensor, Tensor]:
    """Points (48, 8) and their labels (48,), the same at each call."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    points = torch.randn(CLASSES, CHANNELS, generator=generator)[labels]
    points += 0.3 * torch.randn(points.shape, generator=generator)
    return points, labels
