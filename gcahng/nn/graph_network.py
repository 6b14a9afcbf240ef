"""The parameters of the graph network. gcahng.reference says what it computes, and the engine does so faster."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gcahng.bounds import check_number
from gcahng.engine.fits import check_weights
from gcahng.errors import UserError
from gcahng.nn.ablation import GraphAblation
from gcahng.reference.edge_update import EdgeUpdateWeights

_MESSAGES = ("query", "key", "value", "output", "edge_to_node")  # the parts of a NodeLayer that bring messages


def attention_projection(dim: int) -> nn.Linear:
    """A linear map with the authors' initial values: a Xavier-uniform weight, and a bias of zero."""
    linear = nn.Linear(dim, dim)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class NodeLayer(nn.Module):
    """Node attention, the sum over edges, and the node MLP. One LayerNorm serves all three.

    In a network without message passing, the parts of the first two are None.

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
        ablation: what is left out; nothing by default.

    Attributes:
        coefficient_head: the linear map to the sigmoid's argument; to one channel if coefficients="pair", and None if
            coefficients="constant".
        absent: 0, 0-dim, which stands for each parameter that is left out; None if there is none.

    Raises:
        UserError: one of them is out of its range (gcahng.bounds), dim is not divisible by heads, or the weights would
            not fit into memory.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        layers: int = 2,
        heads: int = 4,
        ablation: GraphAblation = GraphAblation(),  # noqa: B008  immutable
    ) -> None:
        super().__init__()
        ablation.check()
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
        self.coefficients, self.message_passing = ablation.coefficients, ablation.message_passing
        self._leave_out()

    def _leave_out(self) -> None:
        """Drops what the ablation leaves out.

        Everything was made before, so that with the same seed what stays starts as in the whole network.
        """
        if not self.message_passing:
            for layer in self.layers:
                for name in _MESSAGES:
                    setattr(layer.node, name, None)
        if self.coefficients == "pair":
            head = self.coefficient_head
            head.weight, head.bias = (nn.Parameter(p.detach()[:1].clone()) for p in (head.weight, head.bias))
            head.out_features = 1
        elif self.coefficients == "constant":
            self.coefficient_head = None
        absent = None if self.message_passing and self.coefficients != "constant" else torch.zeros(())
        self.register_buffer("absent", absent, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GraphNetwork:
        super()._apply(fn, recurse)
        if self.absent is not None:
            self.absent.zero_()  # to_empty leaves it undefined, and no state dict holds it
        return self

    @property
    def ablation(self) -> GraphAblation:
        """What is left out."""
        return GraphAblation(self.coefficients, self.message_passing)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that an optimizer steps."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.node_input.weight.device
