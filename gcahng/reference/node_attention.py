"""Attention of every node to the nodes of other classes, with a sink (paper section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gcahng.nn import NodeLayer


def node_attention(layer: NodeLayer, f: Tensor, other_class: Tensor, heads: int) -> Tensor:
    """Lets every node attend to the nodes of other classes.

    The softmax has one extra logit, the sink, which is fixed at 0 and whose value is 0. So the weights are
    exp(s) / (Σ exp(s) + 1), in a form that cannot overflow.

    Args:
        layer: parameters.
        f: node features (n, D).
        other_class: which nodes are of different classes, (n, n) bool.
        heads: heads of the attention.

    Returns:
        What the nodes attended to (n, D), behind the `output` projection.
    """
    n, dim = f.shape
    q, k, v = (
        projection(f).view(n, heads, dim // heads).transpose(0, 1)
        for projection in (layer.query, layer.key, layer.value)
    )
    logits = (q @ k.transpose(1, 2)) * (dim // heads) ** -0.5
    logits = logits.masked_fill(~other_class, float("-inf"))
    sink = logits.new_zeros(heads, n, 1)
    weights = torch.cat((sink, logits), dim=-1).softmax(dim=-1)[..., 1:]
    attended = (weights.to(v.dtype) @ v).transpose(0, 1).reshape(n, dim)
    return layer.output(attended)
