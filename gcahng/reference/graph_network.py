"""The graph network, in the authors' cost structure: every ordered pair, keys and values per edge (paper section
3.2)."""

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
    """coefficients θ (n, n, D) in (0, 1); node_logits (n, M)."""

    coefficients: Tensor
    node_logits: Tensor


def normalized_rows(z: Tensor) -> Tensor:
    """x̂_i = (z_i - mean(z_i)) / ‖z_i - mean(z_i)‖, the mean over channels: (n, D) → (n, D)."""
    centered = z - z.mean(dim=1, keepdim=True)
    return centered / centered.norm(dim=1, keepdim=True)


def node_update(layer: NodeLayer, f: Tensor, e: Tensor, other_class: Tensor, heads: int) -> Tensor:
    """f (n, D), e (n, n, D) → (n, D): attention, sum over edges, MLP; one LayerNorm serves all three."""
    f = layer.norm(F.gelu(f + node_attention(layer, f, other_class, heads)))
    f = layer.norm(F.gelu(f + edge_to_node(layer, e)))
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
    """Embeddings z (n, D) and class numbers (n,) → every pair's correlation vector and every node's class logits.

    Rows are in canonical order (classes ascending, views by their order in the batch) wherever dropout is used.
    training: batch statistics in both BatchNorms, and dropout if given; update: the running statistics follow.
    """
    x = normalized_rows(z)
    e = edge_start(x, x)
    other_class = classes[:, None] != classes[None, :]
    f = network.node_input(z)
    for number, layer in enumerate(network.layers):
        f = node_update(layer.node, f, e, other_class, network.heads)
        tokens = F.gelu(layer.edge.node_to_edge(f))
        e = edge_update(layer.edge.weights(), e, tokens, dropout if training else None, number)
    nodes = batch_norm(network.node_batch_norm, f, training=training, update=update)
    return GraphOutput(head(network, e, training=training, update=update), network.class_head(nodes))
