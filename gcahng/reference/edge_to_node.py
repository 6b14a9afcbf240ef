"""Each node's sum over its edges: S_i = Σ_j GELU(W_e e_ij + b_e), unnormalized (paper section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from gcahng.nn import NodeLayer


def edge_to_node(layer: NodeLayer, e: Tensor) -> Tensor:
    """S (n, D) of edges e (n, n, D), with a layer's projection W_e and b_e."""
    return F.gelu(layer.edge_to_node(e)).sum(dim=1)
