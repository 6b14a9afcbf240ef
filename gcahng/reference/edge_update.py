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
        query_weight, query_bias, key_weight, key_bias, value_weight, value_bias: (D, D) and (D,), of the attention of
            an edge to its two nodes.
        norm_weight, norm_bias: (D,), of the LayerNorm behind the gate and behind the MLP.
        mlp_in_weight, mlp_in_bias: (4D, D) and (4D,).
        mlp_norm_weight, mlp_norm_bias: (4D,), of the LayerNorm over the hidden channels.
        mlp_out_weight, mlp_out_bias: (D, 4D) and (D,).
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
        p: the chance that a weight is dropped.
        seed: of the random numbers.
        draw: 0-dim int64, the number of the pass.
        symmetric: whether (i, j) and (j, i) share one draw.
    """

    p: float
    seed: int
    draw: Tensor
    symmetric: bool


def edge_update(
    w: EdgeUpdateWeights, edges: Tensor, tokens: Tensor, dropout: Dropout | None = None, layer: int = 0
) -> Tensor:
    """edges (n, n, D), tokens (n, D) → the updated edges (n, n, D).

    Args:
        w: the parameters.
        edges: all ordered pairs.
        tokens: what an edge attends to, one row a node.
        dropout: of the attention weights; None for none.
        layer: which layer's draws the masks are.
    """
    mask, p = None, 0.0
    if dropout is not None and dropout.p > 0:
        p = dropout.p
        mask = edge_dropout_masks(
            tokens.shape[0], layer=layer, draw=dropout.draw, seed=dropout.seed, p=p, symmetric=dropout.symmetric
        )
    e = gate(w, edges, tokens, mask, p)
    return mlp_out(w, mlp_in(w, e), e)
