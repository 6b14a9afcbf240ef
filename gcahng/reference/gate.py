"""Attention of one edge to its two end nodes, and the residual norm behind it (paper section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.reference.norm_gelu import norm_gelu

if TYPE_CHECKING:
    from gcahng.reference.edge_update import EdgeUpdateWeights


def gate(w: EdgeUpdateWeights, e: Tensor, tokens: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """e (n, n, D), tokens s (n, D), mask bool (n, n, 2) or None → e¹ (n, n, D).

    The edge is one query over the two tokens (s_i, s_j), scale 1/√D. Where mask is True an attention weight stays, and
    is divided by 1 - p. Keys and values are projected edge by edge, as the authors do: that is what the gate's
    node-level formulas are tested against.
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
