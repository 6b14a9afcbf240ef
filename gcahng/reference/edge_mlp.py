"""The MLP of an edge, with its residual norm (paper section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from gcahng.nn import EdgeLayer


def edge_mlp(layer: EdgeLayer, e: Tensor) -> Tensor:
    """e¹ (..., D) → N_e(MLP(e¹) + e¹), MLP = Linear, GELU, LayerNorm over 4D, Linear. N_e is the gate's own norm,
    used again."""
    hidden = layer.mlp_norm(F.gelu(layer.mlp_in(e)))
    return layer.norm(F.gelu(layer.mlp_out(hidden) + e))
