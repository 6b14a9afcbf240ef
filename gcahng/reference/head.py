"""Correlation vectors from edges: θ = sigmoid(fc(BatchNorm(e))) (paper section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from gcahng.nn import GraphNetwork


CONSTANT = 0.5
"""θ of coefficients="constant": that of a head whose weights are 0."""


def momentum(norm: nn.BatchNorm1d) -> float:
    """What the next batch weighs in the running statistics.

    A momentum of None, which weight averaging sets, gives all batches the same weight, as in torch.
    """
    return 1 / (int(norm.num_batches_tracked) + 1) if norm.momentum is None else norm.momentum


def batch_norm(norm: nn.BatchNorm1d, x: Tensor, *, training: bool, update: bool) -> Tensor:
    """BatchNorm over the rows of x.

    Args:
        norm: parameters and running statistics, which are updated in place.
        x: (N, D).
        training: whether x is normalized by batch statistics rather than by the running ones.
        update: whether the running statistics follow those of the batch in training.

    Returns:
        Normalized rows (N, D).
    """
    weight = momentum(norm)
    if training and update:
        norm.num_batches_tracked.add_(1)
    return F.batch_norm(
        x,
        norm.running_mean if update or not training else None,
        norm.running_var if update or not training else None,
        norm.weight,
        norm.bias,
        training,
        weight,
        norm.eps,
    )


def head(network: GraphNetwork, e: Tensor, *, training: bool, update: bool) -> Tensor:
    """Computes θ. The BatchNorm runs over all n² edges.

    With coefficients="pair" all channels of a pair have the same coefficient. With "constant" all pairs have it, and
    the edges only leave their statistics.

    Args:
        network: parameters.
        e: edges that leave the last layer (n, n, D).
        training: see batch_norm.
        update: see batch_norm.

    Returns:
        θ (n, n, D) in (0, 1).
    """
    n, _, dim = e.shape
    rows = batch_norm(network.edge_batch_norm, e.reshape(n * n, dim), training=training, update=update)
    if network.coefficients == "constant":
        return rows.new_full((n, n, dim), CONSTANT)
    return torch.sigmoid(network.coefficient_head(rows)).view(n, n, -1).expand(n, n, dim)
