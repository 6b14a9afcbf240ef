"""Seeded inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def seeded(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
    """A normal tensor of this shape, drawn in fp64 on the CPU: every dtype and device gets the same values, rounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


class EdgeStartInputs(NamedTuple):
    """x_i (I, D), x_j (J, D), both requiring gradients, and a random upstream gradient grad_e (I, J, D)."""

    x_i: Tensor
    x_j: Tensor
    grad_e: Tensor


def edge_start_inputs(
    rows: int,
    columns: int,
    channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> EdgeStartInputs:
    """Inputs of one tile: rows I, columns J, channels D."""
    shapes = ((rows, channels), (columns, channels), (rows, columns, channels))
    x_i, x_j, grad_e = (seeded(*shape, seed=3 * seed + k, dtype=dtype, device=device) for k, shape in enumerate(shapes))
    return EdgeStartInputs(x_i.requires_grad_(), x_j.requires_grad_(), grad_e)
