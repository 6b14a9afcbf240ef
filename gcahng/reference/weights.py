"""The parameters of an edge update, which its parts share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
