"""Attention of one edge to its two end nodes, and the residual norm behind it (paper section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from gcahng.nn import EdgeLayer


def gate(layer: EdgeLayer, e: Tensor, tokens: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """e (n, n, D), tokens s (n, D), keep bool (n, n, 2) or None → e¹ (n, n, D).

    The edge is one query over the two tokens (s_i, s_j), scale 1/√D; kept attention weights are divided by 1 - p.
    Keys and values are projected edge by edge, as the authors do: that is what the gate's node-level formulas are
    tested against.
    """
    n, dim = tokens.shape
    pair = torch.stack((tokens[:, None].expand(n, n, dim), tokens[None, :].expand(n, n, dim)), dim=2)  # (n, n, 2, D)
    query, key, value = layer.query(e), layer.key(pair), layer.value(pair)
    logits = torch.einsum("ijd,ijtd->ijt", query, key) * dim**-0.5
    weights = logits.softmax(dim=-1)
    if keep is not None:
        weights = weights * keep / (1 - p)
    attended = torch.einsum("ijt,ijtd->ijd", weights.to(value.dtype), value)
    return layer.norm(F.gelu(attended + e))
