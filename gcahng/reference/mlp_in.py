"""The first half of an edge's MLP (paper section 3.2)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gcahng.reference.weights import EdgeUpdateWeights


def mlp_in(w: EdgeUpdateWeights, e: Tensor) -> Tensor:
    """The normalized hidden channels LayerNorm(GELU(Linear(e))) (..., 4D) of edges e (..., D)."""
    hidden = F.gelu(F.linear(e, w.mlp_in_weight, w.mlp_in_bias))
    return F.layer_norm(hidden, hidden.shape[-1:], w.mlp_norm_weight, w.mlp_norm_bias)
