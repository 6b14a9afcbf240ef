"""Half-band storage of symmetric edges: one row for both directions of a pair, n (n + 1) / 2 rows in all.

With H = (n + 1) // 2, row a·H + k is the edge of nodes a and (a + k) mod n, for k < H. If n is even, n / 2 more rows
follow: the edges of nodes a and a + n / 2, for a < n / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcahng.errors import UserError


def half_band_pairs(n: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Lists the pairs of nodes that the rows stand for.

    Args:
        n: nodes.
        device: of the result.

    Returns:
        The nodes i and j of each row, (n (n + 1) / 2,) int64 each.
    """
    offsets, node = (n + 1) // 2, torch.arange(n, device=device)
    i = node.repeat_interleave(offsets)
    j = (i + torch.arange(offsets, device=device).repeat(n)) % n
    if n % 2:
        return i, j
    rest = node[: n // 2]
    return torch.cat((i, rest)), torch.cat((j, rest + n // 2))


def half_band_nodes(rows: int) -> int:
    """The number n of nodes whose edges take n (n + 1) / 2 rows.

    Args:
        rows: the number of rows.

    Raises:
        UserError: there is no such n.
    """
    n = (math.isqrt(8 * rows + 1) - 1) // 2
    if n * (n + 1) // 2 != rows:
        raise UserError(f"edges has {rows} rows; in half-band storage it must have n (n + 1) / 2, n being the nodes")
    return n


def to_half_band(edges: Tensor) -> Tensor:
    """Converts edges to half-band storage. Differentiable.

    Args:
        edges: (n, n, D).

    Returns:
        The mean of both directions of each pair, (n (n + 1) / 2, D).
    """
    i, j = half_band_pairs(edges.shape[0], edges.device)
    return (edges[i, j] + edges[j, i]) / 2


def from_half_band(half: Tensor) -> Tensor:
    """Converts edges from half-band storage. Differentiable.

    Args:
        half: (n (n + 1) / 2, D).

    Returns:
        Edges (n, n, D).

    Raises:
        UserError: the number of rows is not n (n + 1) / 2 for any n.
    """
    n = half_band_nodes(half.shape[0])
    i, j = half_band_pairs(n, half.device)
    row = torch.empty(n, n, dtype=torch.int64, device=half.device)
    numbers = torch.arange(half.shape[0], device=half.device)
    row[i, j] = numbers
    row[j, i] = numbers
    return half[row]
