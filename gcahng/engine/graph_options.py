"""How a pass of the graph network runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class GraphOptions:
    """How a pass of the graph network runs.

    Attributes:
        heads: heads H of the node attention.
        compute: dtype of products.
        training: whether the BatchNorms normalize by batch statistics, rather than by running ones.
        update: whether the running statistics follow those of the batch.
        momentum: of both BatchNorms.
        eps: of both BatchNorms.
        edge_memory: store, hidden or recompute.
        edge_dtype: dtype of stored edges.
    """

    heads: int
    compute: torch.dtype
    training: bool
    update: bool
    momentum: float
    eps: float
    edge_memory: str
    edge_dtype: torch.dtype
