"""The edge update of a layer, on all pairs of n nodes: gate, MLP, norms (paper section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gcahng.reference.gate import gate
from gcahng.reference.mlp_in import mlp_in
from gcahng.reference.mlp_out import mlp_out
from gcahng.reference.philox import edge_dropout_masks
from gcahng.reference.weights import EdgeUpdateWeights


class Dropout(NamedTuple):
    """What the dropout of edges' attention weights depends on, beside the edge and the layer.

    Attributes:
        p: chance that a weight is dropped.
        seed: of the random numbers.
        draw: number of the pass, 0-dim int64.
        symmetric: whether (i, j) and (j, i) share one draw.
    """

    p: float
    seed: int
    draw: Tensor
    symmetric: bool


def edge_update(
    w: EdgeUpdateWeights, edges: Tensor, tokens: Tensor, dropout: Dropout | None = None, layer: int = 0
) -> Tensor:
    """Updates the edges of all ordered pairs.

    Args:
        w: parameters.
        edges: (n, n, D).
        tokens: what an edge attends to, one row per node (n, D).
        dropout: dropout of the attention weights, or None.
        layer: the layer's number; each layer has dropout masks of its own.

    Returns:
        The updated edges (n, n, D).
    """
    mask, p = None, 0.0
    if dropout is not None and dropout.p > 0:
        p = dropout.p
        mask = edge_dropout_masks(
            tokens.shape[0], layer=layer, draw=dropout.draw, seed=dropout.seed, p=p, symmetric=dropout.symmetric
        )
    e = gate(w, edges, tokens, mask, p)
    return mlp_out(w, mlp_in(w, e), e)
