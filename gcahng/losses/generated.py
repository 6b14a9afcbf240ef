"""What a loss hands out of what it generates."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Generated(NamedTuple):
    """What `GCAHNGLoss.generate` returns.

    A is the number of anchor classes: C, or as many as were asked for, in the order in which they were asked for.

    Attributes:
        negatives: (K, A, C, D), for anchor view k of class a the synthetic sample of class c. The entries a = c are no
            negatives.
        coefficients: θ (A·K, n, D) of every anchor row and every row of the batch, both in the caller's order.
        classes: labels in ascending order (C,), which is the order of a and c.
        index: the batch's row that is view k of class a, (K, C).
    """

    negatives: Tensor
    coefficients: Tensor
    classes: Tensor
    index: Tensor
