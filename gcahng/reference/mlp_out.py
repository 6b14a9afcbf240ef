"""The second half of an edge's MLP, with its residual norm (paper section 3.2)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gcahng.reference.norm_gelu import norm_gelu
from gcahng.reference.weights import EdgeUpdateWeights


def mlp_out(w: EdgeUpdateWeights, hidden: Tensor, e: Tensor) -> Tensor:
    """N(Linear(hidden) + e), where N is the gate's norm, used again.

    Args:
        w: parameters.
        hidden: normalized hidden channels (..., 4D).
        e: edges e¹ behind the gate (..., D).

    Returns:
        The updated edges (..., D).
    """
    return norm_gelu(F.linear(hidden, w.mlp_out_weight, w.mlp_out_bias) + e, w.norm_weight, w.norm_bias)
