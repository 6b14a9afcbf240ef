"""Half-band storage of symmetric edges: one row for both directions of a pair, n (n + 1) / 2 rows in all.

With H = (n + 1) // 2, row a·H + k is the edge of nodes a and (a + k) mod n, for k < H. For even n, n / 2 more rows
follow, the edges of nodes a and a + n / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcahng.errors import UserError


def half_band_pairs(n: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The nodes i and j (n (n + 1) / 2,) of each row."""
    offsets, node = (n + 1) // 2, torch.arange(n, device=device)
    i = node.repeat_interleave(offsets)
    j = (i + torch.arange(offsets, device=device).repeat(n)) % n
    if n % 2:
        return i, j
    rest = node[: n // 2]
    return torch.cat((i, rest)), torch.cat((j, rest + n // 2))


def half_band_nodes(rows: int) -> int:
    """n, of n (n + 1) / 2 rows.

    Raises:
        UserError: there is no such n.
    """
    n = (math.isqrt(8 * rows + 1) - 1) // 2
    if n * (n + 1) // 2 != rows:
        raise UserError(f"edges has {rows} rows; in half-band storage it must have n (n + 1) / 2, n being the nodes")
    return n


def to_half_band(edges: Tensor) -> Tensor:
    """edges (n, n, D) → (n (n + 1) / 2, D), the mean of both directions. Differentiable."""
    i, j = half_band_pairs(edges.shape[0], edges.device)
    return (edges[i, j] + edges[j, i]) / 2


def from_half_band(half: Tensor) -> Tensor:
    """(n (n + 1) / 2, D) → edges (n, n, D). Differentiable.

    Raises:
        UserError: half has another number of rows.
    """
    n = half_band_nodes(half.shape[0])
    i, j = half_band_pairs(n, half.device)
    row = torch.empty(n, n, dtype=torch.int64, device=half.device)
    numbers = torch.arange(half.shape[0], device=half.device)
    row[i, j] = numbers
    row[j, i] = numbers
    return half[row]
