"""An edge's first vector: e⁰_ij = x̂_i ∘ x̂_j (paper section 3.2)."""

from __future__ import annotations

from torch import Tensor


def edge_start(x_i: Tensor, x_j: Tensor) -> Tensor:
    """The product per channel of each row of x_i (I, D) with each row of x_j (J, D): (I, J, D)."""
    return x_i[:, None, :] * x_j[None, :, :]
