"""The edge update of a layer, on all pairs of n nodes: gate, MLP, norms (paper section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gcahng.reference.gate import gate
from gcahng.reference.mlp_in import mlp_in
from gcahng.reference.mlp_out import mlp_out
from gcahng.reference.philox import edge_dropout_masks


class EdgeUpdateWeights(NamedTuple):
    """The parameters of one edge update with D channels, as torch.nn.Linear and LayerNorm have them.

    Attributes:
        query_weight: (D, D), of the attention of an edge to its two nodes.
        query_bias: (D,).
        key_weight: (D, D).
        key_bias: (D,).
        value_weight: (D, D).
        value_bias: (D,).
        norm_weight: (D,), of the LayerNorm that is used both behind the gate and behind the MLP.
        norm_bias: (D,).
        mlp_in_weight: (4D, D).
        mlp_in_bias: (4D,).
        mlp_norm_weight: (4D,), of the LayerNorm over the hidden channels.
        mlp_norm_bias: (4D,).
        mlp_out_weight: (D, 4D).
        mlp_out_bias: (D,).
    """

    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    mlp_in_weight: Tensor
    mlp_in_bias: Tensor
    mlp_norm_weight: Tensor
    mlp_norm_bias: Tensor
    mlp_out_weight: Tensor
    mlp_out_bias: Tensor


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
