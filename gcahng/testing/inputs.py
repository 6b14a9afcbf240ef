"""Seeded inputs, and inputs moved by a rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def seeded(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
    """A normal tensor of this shape, drawn in fp64 on the CPU: every dtype and device gets the same values, rounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def moved(x: Tensor, by: torch.dtype, generator: torch.Generator) -> Tensor:
    """Every value moved by at most one rounding in this dtype, the same way for the same generator."""
    noise = 2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1
    return x * (1 + torch.finfo(by).eps / 2 * noise).to(x.dtype)
