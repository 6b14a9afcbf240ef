"""Attention of one edge to its two end nodes, and the residual norm behind it (paper section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.reference.norm_gelu import norm_gelu
from gcahng.reference.weights import EdgeUpdateWeights


def gate(w: EdgeUpdateWeights, e: Tensor, tokens: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Lets each edge attend to its two nodes.

    The edge is one query over the two tokens (s_i, s_j), with scale 1/√D. Keys and values are projected edge by edge,
    as the authors do. The engine's formulas, which project them node by node, are tested against it.

    Args:
        w: parameters.
        e: edges (n, n, D).
        tokens: s (n, D).
        mask: which attention weights stay, (n, n, 2) bool, or None for no dropout. Those are divided by 1 - p.
        p: chance that a weight is dropped.

    Returns:
        e¹ (n, n, D).
    """
    n, dim = tokens.shape
    pair = torch.stack((tokens[:, None].expand(n, n, dim), tokens[None, :].expand(n, n, dim)), dim=2)  # (n, n, 2, D)
    query = F.linear(e, w.query_weight, w.query_bias)
    key, value = F.linear(pair, w.key_weight, w.key_bias), F.linear(pair, w.value_weight, w.value_bias)
    logits = torch.einsum("ijd,ijtd->ijt", query, key) * dim**-0.5
    weights = logits.softmax(dim=-1)
    if mask is not None:
        weights = weights * mask / (1 - p)
    attended = torch.einsum("ijt,ijtd->ijd", weights.to(value.dtype), value)
    return norm_gelu(attended + e, w.norm_weight, w.norm_bias)
