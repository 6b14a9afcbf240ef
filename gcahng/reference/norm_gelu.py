"""N(x) = LayerNorm(GELU(x)), which stands behind every residual of the graph network (paper section 3.2)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def norm_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """N(x) (..., D) of x (..., D), with weight and bias (D,) and ε = 1e-5."""
    return F.layer_norm(F.gelu(x), x.shape[-1:], weight, bias)
