"""Attention of every node to the nodes of other classes, with a sink (design: node attention; paper section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gcahng.nn import NodeLayer


def node_attention(layer: NodeLayer, f: Tensor, other_class: Tensor, heads: int) -> Tensor:
    """f (n, D), other_class bool (n, n) → (n, D), the `output` projection included.

    The softmax has one extra logit fixed at 0 whose value is 0: exp(s) / (Σ exp(s) + 1), written so that it cannot
    overflow.
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
