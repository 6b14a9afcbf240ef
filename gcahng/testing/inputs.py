"""Seeded inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def seeded(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
    """A normal tensor of this shape, drawn in fp64 on the CPU: every dtype and device gets the same values, rounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
