"""The parameters of the graph network. gcahng.reference says what it computes, and the engine does so faster."""

from __future__ import annotations

import torch
from torch import nn

from gcahng.bounds import check_number
from gcahng.engine.fits import check_weights
from gcahng.errors import UserError
from gcahng.reference.edge_update import EdgeUpdateWeights


def attention_projection(dim: int) -> nn.Linear:
    """A linear map with the authors' initial values: a Xavier-uniform weight, and a bias of zero."""
    linear = nn.Linear(dim, dim)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class NodeLayer(nn.Module):
    """Node attention, the sum over edges, and the node MLP. One LayerNorm serves all three.

    Args:
        dim: channels D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = attention_projection(dim)
        self.key = attention_projection(dim)
        self.value = attention_projection(dim)
        self.output = attention_projection(dim)
        self.edge_to_node = nn.Linear(dim, dim)
        self.mlp_in = nn.Linear(dim, 4 * dim)
        self.mlp_out = nn.Linear(4 * dim, dim)
        self.norm = nn.LayerNorm(dim)
        # Nothing uses this linear map. It is here because the authors' checkpoints hold it, so that one survives the
        # round trip.
        unused = nn.Linear(dim, dim)
        self.register_buffer("update_node_weight", unused.weight.detach())
        self.register_buffer("update_node_bias", unused.bias.detach())


class EdgeLayer(nn.Module):
    """Attention of an edge to its two nodes, and the edge MLP. `norm` is used behind both.

    Args:
        dim: channels D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = attention_projection(dim)
        self.key = attention_projection(dim)
        self.value = attention_projection(dim)
        self.node_to_edge = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, 4 * dim)
        self.mlp_norm = nn.LayerNorm(4 * dim)
        self.mlp_out = nn.Linear(4 * dim, dim)

    def weights(self) -> EdgeUpdateWeights:
        """The parameters that the edge update takes. Its tokens come from node_to_edge."""
        return edge_update_weights(self)


def edge_update_weights(layer: nn.Module) -> EdgeUpdateWeights:
    """The parameters of a module with query, key, value, norm, mlp_in, mlp_norm and mlp_out, for the edge update."""
    modules = (layer.query, layer.key, layer.value, layer.norm, layer.mlp_in, layer.mlp_norm, layer.mlp_out)
    return EdgeUpdateWeights(*(x for module in modules for x in (module.weight, module.bias)))


class GraphLayer(nn.Module):
    """One layer, which updates nodes first and then edges.

    Args:
        dim: channels D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.node = NodeLayer(dim)
        self.edge = EdgeLayer(dim)


class GraphNetwork(nn.Module):
    """The graph network over the complete graph of a batch (paper section 3.2).

    The weights of both BatchNorms are trained, and their biases stay as they start.

    Args:
        dim: channels D of the embeddings.
        num_classes: training classes M.
        layers: layers L.
        heads: heads H of the node attention, a divisor of D.

    Raises:
        UserError: one of them is out of its range (gcahng.bounds), dim is not divisible by heads, or the weights would
            not fit into memory.
    """

    def __init__(self, dim: int, num_classes: int, *, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        for name, value in (("embedding_dim", dim), ("num_classes", num_classes), ("layers", layers), ("heads", heads)):
            check_number(name, value)
        if dim % heads:
            raise UserError(f"embedding_dim is {dim} and heads is {heads}; embedding_dim must be divisible by heads")
        check_weights(dim, layers, num_classes)
        self.dim, self.num_classes, self.heads = dim, num_classes, heads
        self.node_input = nn.Linear(dim, dim)
        self.layers = nn.ModuleList(GraphLayer(dim) for _ in range(layers))
        self.edge_batch_norm = nn.BatchNorm1d(dim)
        self.node_batch_norm = nn.BatchNorm1d(dim)
        self.edge_batch_norm.bias.requires_grad_(False)
        self.node_batch_norm.bias.requires_grad_(False)
        self.coefficient_head = nn.Linear(dim, dim)
        self.class_head = nn.Linear(dim, num_classes)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that an optimizer steps."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.node_input.weight.device
