"""The second half of an edge's MLP, with its residual norm (paper section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from gcahng.reference.norm_gelu import norm_gelu

if TYPE_CHECKING:
    from gcahng.reference.edge_update import EdgeUpdateWeights


def mlp_out(w: EdgeUpdateWeights, hidden: Tensor, e: Tensor) -> Tensor:
    """Hidden channels (..., 4D) and e¹ (..., D) → N(Linear(hidden) + e¹) (..., D). N is the gate's own norm, used
    again."""
    return norm_gelu(F.linear(hidden, w.mlp_out_weight, w.mlp_out_bias) + e, w.norm_weight, w.norm_bias)
