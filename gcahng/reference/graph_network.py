"""The graph network (paper section 3.2).

It computes every ordered pair, and keys and values per edge, as the authors' code does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from gcahng.reference.edge_start import edge_start
from gcahng.reference.edge_to_node import edge_to_node
from gcahng.reference.edge_update import Dropout, edge_update
from gcahng.reference.head import batch_norm, head
from gcahng.reference.node_attention import node_attention

if TYPE_CHECKING:
    from gcahng.nn import GraphNetwork, NodeLayer


class GraphOutput(NamedTuple):
    """What the graph network returns.

    Attributes:
        coefficients: θ (n, n, D) in (0, 1).
        node_logits: class logits of the nodes (n, M).
    """

    coefficients: Tensor
    node_logits: Tensor


def normalized_rows(z: Tensor) -> Tensor:
    """x̂_i = (z_i - mean(z_i)) / ‖z_i - mean(z_i)‖ (n, D) of z (n, D), with the mean over channels."""
    centered = z - z.mean(dim=1, keepdim=True)
    return centered / centered.norm(dim=1, keepdim=True)


def node_update(layer: NodeLayer, f: Tensor, e: Tensor, other_class: Tensor, heads: int) -> Tensor:
    """A layer's node update: attention, sum over edges, and MLP. One LayerNorm serves all three.

    Args:
        layer: parameters.
        f: node features (n, D).
        e: edges (n, n, D).
        other_class: which nodes are of different classes, (n, n) bool.
        heads: heads of the attention.

    Returns:
        Node features (n, D).
    """
    f = layer.norm(F.gelu(f + node_attention(layer, f, other_class, heads)))
    f = layer.norm(F.gelu(f + edge_to_node(layer, e)))
    return node_mlp(layer, f)


def node_update_alone(layer: NodeLayer, f: Tensor) -> Tensor:
    """A layer's node update without messages: node_update with both sums left out. f and the result are (n, D)."""
    for _ in range(2):
        f = layer.norm(F.gelu(f))
    return node_mlp(layer, f)


def node_mlp(layer: NodeLayer, f: Tensor) -> Tensor:
    """A layer's node MLP. f and the result are (n, D)."""
    return layer.norm(F.gelu(f + layer.mlp_out(F.gelu(layer.mlp_in(f)))))


def graph_network(
    network: GraphNetwork,
    z: Tensor,
    classes: Tensor,
    *,
    training: bool,
    dropout: Dropout | None = None,
    update: bool = True,
) -> GraphOutput:
    """Computes the correlation vector of every pair and the class logits of every node.

    Args:
        network: parameters.
        z: embeddings (n, D). If dropout is used, they must be in canonical order: classes ascending, the views of a
            class in their order in the batch.
        classes: class of each row (n,).
        training: whether both BatchNorms normalize by batch statistics, and dropout is used.
        dropout: dropout of the edges' attention weights, or None.
        update: whether the running statistics follow those of the batch in training.
    """
    x = normalized_rows(z)
    e = edge_start(x, x)
    other_class = classes[:, None] != classes[None, :]
    f = network.node_input(z)
    for number, layer in enumerate(network.layers):
        if network.message_passing:
            f = node_update(layer.node, f, e, other_class, network.heads)
        else:
            f = node_update_alone(layer.node, f)
        tokens = F.gelu(layer.edge.node_to_edge(f))
        e = edge_update(layer.edge.weights(), e, tokens, dropout if training else None, number)
    nodes = batch_norm(network.node_batch_norm, f, training=training, update=update)
    return GraphOutput(head(network, e, training=training, update=update), network.class_head(nodes))
