"""The graph network's parameters as the engine sees them: a flat list in a fixed order, and what a pass prepares from
it."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gcahng.engine.stages.common import StageContext
    from gcahng.nn.graph_network import GraphNetwork

_NODE_LINEARS = ("query", "key", "value", "output", "edge_to_node", "mlp_in", "mlp_out", "norm")
_EDGE_LINEARS = ("query", "key", "value", "node_to_edge", "norm", "mlp_in", "mlp_norm", "mlp_out")


def _pairs(*modules: str) -> list[str]:
    """The names of weight and bias of each module."""
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def parameter_names(layers: int) -> list[str]:
    """Names of the trainable parameters of a GraphNetwork, in the order in which the engine passes them."""
    names = _pairs("node_input")
    for layer in range(layers):
        names += _pairs(*(f"layers.{layer}.node.{part}" for part in _NODE_LINEARS))
        names += _pairs(*(f"layers.{layer}.edge.{part}" for part in _EDGE_LINEARS))
    return [
        *names,
        "edge_batch_norm.weight",
        *_pairs("coefficient_head"),
        "node_batch_norm.weight",
        *_pairs("class_head"),
    ]


def metric_names(layers: int) -> list[str]:
    """Names of the parameters with a gradient in phase 1.

    θ is held fixed there, so that the last edge update and the coefficient head have none.
    """
    without = (f"layers.{layers - 1}.edge.", "edge_batch_norm.", "coefficient_head.")
    return [name for name in parameter_names(layers) if not name.startswith(without)]


def generator_names(layers: int) -> list[str]:
    """Names of the parameters with a gradient in phase 3, in which the node head has none."""
    return [name for name in parameter_names(layers) if not name.startswith(("class_head.", "node_batch_norm."))]


def fixed_in_metric_pass(network: GraphNetwork) -> set[str]:
    """Names of parameters that have no gradient in phase 1 for what the network leaves out.

    Without message passing no edge reaches a node.
    """
    names = metric_names(len(network.layers))
    return set() if network.message_passing else {name for name in names if ".edge." in name}


def fixed_in_generator_pass(network: GraphNetwork) -> set[str]:
    """Names of parameters that have no gradient in phase 3 for what the network leaves out.

    Nothing leads to a θ that is constant.
    """
    return set(generator_names(len(network.layers))) if network.coefficients == "constant" else set()


def parameter_list(network: GraphNetwork, fixed: Set[str] = frozenset()) -> list[Tensor]:
    """The parameters that parameter_names lists, in the shapes that they have in a whole network.

    What a network leaves out is a matter of these tensors alone, and no code behind them knows of it. A coefficient for
    all channels is a head with equal rows, whose gradients autograd adds up. Nodes get no message where the linear maps
    that bring them are 0, and θ is ½ where the head is 0.

    Args:
        network: owns them.
        fixed: names of those that must not get a gradient.
    """
    named, dim = dict(network.named_parameters()), network.dim
    shapes = {"weight": (dim, dim), "bias": (dim,)}
    found = []
    for name in parameter_names(len(network.layers)):
        parameter = named.get(name, network.absent)
        if name not in named or (name.startswith("coefficient_head.") and network.coefficients == "pair"):
            parameter = parameter.expand(shapes[name.rpartition(".")[2]])
        found.append(parameter.detach() if name in fixed else parameter)
    return found


def buffer_list(network: GraphNetwork) -> list[Tensor]:
    """Running mean, running variance, count and frozen bias of the edge BatchNorm, then those of the node BatchNorm."""
    norms = (network.edge_batch_norm, network.node_batch_norm)
    return [
        t for norm in norms for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.bias.detach())
    ]


# What the node side multiplies by. The class head is not among them, which one phase alone needs.
_NODE_OPERANDS = ("node.output", "node.mlp_in", "node.mlp_out", "edge.node_to_edge", "edge.key", "edge.value")
_WEIGHT_OPERANDS = ("edge.query", "edge.mlp_in", "node.edge_to_node")
_STACKED = ("node.query", "node.key", "node.value")


class LowWeights:
    """The parameters as operands of products: in the dtype of products, and prepared by one call of torch.

    Args:
        named: the graph network's parameters by name.
        layers: layers L.
        context: memory, and the dtypes.

    Attributes:
        stacked: for each layer the node attention's three weights (3D, D) and biases (3D,): query, key and value.
    """

    def __init__(self, named: dict[str, Tensor], layers: int, context: StageContext) -> None:
        self._low = dict(named)
        self.stacked: list[tuple[Tensor, Tensor]] = []
        copies: list[tuple[Tensor, Tensor]] = []
        for layer in range(layers):
            at = f"layers.{layer}"
            parts = [f"{at}.{part}" for part in _STACKED]
            dim = len(named[f"{parts[0]}.bias"])
            weight, *weights = _stack(context, f"stacked weight {layer}", dim, dim)
            bias, *biases = _stack(context, f"stacked bias {layer}", dim, 1)
            self.stacked.append((weight, bias))
            copies += [(to, named[f"{part}.weight"]) for part, to in zip(parts, weights, strict=True)]
            copies += [(to, named[f"{part}.bias"]) for part, to in zip(parts, biases, strict=True)]
        if not context.same:
            names = ["coefficient_head.weight", *_pairs("node_input")]
            for layer in range(layers):
                names += _pairs(*(f"layers.{layer}.{part}" for part in _NODE_OPERANDS))
                names += [f"layers.{layer}.{part}.weight" for part in _WEIGHT_OPERANDS]
            for name in names:
                self._low[name] = _room(context, name, named[name])
                copies.append((self._low[name], named[name]))
        torch._foreach_copy_([to for to, _ in copies], [x for _, x in copies])

    def __getitem__(self, name: str) -> Tensor:
        """The parameter of this name, which must be one that products take."""
        return self._low[name]


def _stack(context: StageContext, slot: str, dim: int, width: int) -> tuple[Tensor, ...]:
    """Memory (3D, W), and its three parts (D, W); without the last dimension if W = 1."""

    def parts(whole: Tensor) -> tuple[Tensor, ...]:
        whole = whole.squeeze(1)
        return (whole, *whole.split(dim))

    return context.views(slot, 3 * dim, width, parts)


def _room(context: StageContext, name: str, x: Tensor) -> Tensor:
    """Memory for a parameter in the dtype of products."""
    if x.dim() == 2:
        return context.scratch(f"low {name}", *x.shape)
    (row,) = context.views(f"low {name}", 1, len(x), lambda whole: (whole.view(-1),))
    return row


class NormWeights(NamedTuple):
    """The parameters of LayerNorm(GELU(·)).

    Attributes:
        gamma: γ (D,).
        beta: β (D,).
    """

    gamma: Tensor
    beta: Tensor


class Fold(NamedTuple):
    """The LayerNorm over the hidden channels, folded into the second product (see EdgeWeights).

    Attributes:
        w: W₂' 1 (D,).
        d: W₂ β + b₂ (D,).
    """

    w: Tensor
    d: Tensor


class EdgeWeights(NamedTuple):
    """One layer's edge parameters, prepared: products in the compute dtype, vectors in the accumulating one.

    The LayerNorm over the 4D hidden channels is folded into the second product: with W₂' = W₂ diag(γ), w = W₂' 1 and
    d = W₂ β + b₂, LN(g) W₂ᵀ + b₂ = (g W₂'ᵀ - μ w) / σ + d.

    Attributes:
        w1: W₁ (4D, D).
        b1: b₁ (4D,).
        w2: W₂' (D, 4D).
        w: W₂' 1 (D,).
        d: W₂ β + b₂ (D,).
        gamma: γ (D,) of the edge norm.
        beta: β (D,) of the edge norm.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    w: Tensor
    d: Tensor
    gamma: Tensor
    beta: Tensor

    @property
    def fold(self) -> Fold:
        """The LayerNorm over the hidden channels, as folded into the second product."""
        return Fold(self.w, self.d)

    @property
    def norm(self) -> NormWeights:
        """The edge norm."""
        return NormWeights(self.gamma, self.beta)


class ToNodeWeights(NamedTuple):
    """One layer's edge-to-node projection.

    Attributes:
        weight: W_e (D, D), in the compute dtype.
        bias: b_e (D,).
    """

    weight: Tensor
    bias: Tensor


class ToNodeSums(NamedTuple):
    """Gradients of ToNodeWeights, which are added up over all edges.

    Attributes:
        weight: (D, D).
        bias: (D,).
    """

    weight: Tensor
    bias: Tensor


def edge_weights(
    named: dict[str, Tensor], layer: int, context: StageContext, low: LowWeights | None = None
) -> EdgeWeights:
    """Prepares a layer's edge parameters.

    Args:
        named: the graph network's parameters by name.
        layer: the layer's number.
        context: memory, and the dtypes.
        low: the operands of products, if they are prepared already.
    """
    prefix = f"layers.{layer}.edge"
    gamma4, beta4 = named[f"{prefix}.mlp_norm.weight"], named[f"{prefix}.mlp_norm.bias"]
    w1, w2 = named[f"{prefix}.mlp_in.weight"], named[f"{prefix}.mlp_out.weight"]
    folded = context.scratch(f"folded {layer}", *w2.shape)
    torch.mul(w2, gamma4, out=folded)
    return EdgeWeights(
        w1=w1.to(context.compute) if low is None else low[f"{prefix}.mlp_in.weight"],
        b1=named[f"{prefix}.mlp_in.bias"],
        w2=folded,
        w=folded.sum(dim=1, dtype=w2.dtype),
        d=torch.addmv(named[f"{prefix}.mlp_out.bias"], w2, beta4),
        gamma=named[f"{prefix}.norm.weight"],
        beta=named[f"{prefix}.norm.bias"],
    )


def to_node_weights(named: dict[str, Tensor], layer: int, low: LowWeights) -> ToNodeWeights:
    """Prepares a layer's edge-to-node projection; arguments as of edge_weights."""
    prefix = f"layers.{layer}.node.edge_to_node"
    return ToNodeWeights(low[f"{prefix}.weight"], named[f"{prefix}.bias"])


class EdgeGradients:
    """Sums over all tiles from which the gradients of one layer's edge parameters follow.

    Args:
        dim: channels D.
        like: a tensor of the dtype and on the device of the sums.

    Attributes:
        w1: gradient of W₁ (4D, D).
        b1: gradient of b₁ (4D,).
        out_g: Σ (ds/σ) ⊗ g (D, 4D).
        mlp_out_sums: the four sums (4, D) that follow, as one tensor.
        norm: gradients of the edge norm's γ and β (D,).
        out: Σ ds (D,).
        out_mean: Σ (ds/σ) μ (D,).
    """

    def __init__(self, dim: int, like: Tensor) -> None:
        self.w1 = like.new_zeros(4 * dim, dim)
        self.b1 = like.new_zeros(4 * dim)
        self.out_g = like.new_zeros(dim, 4 * dim)
        self.mlp_out_sums = like.new_zeros(4, dim)
        gamma, beta, self.out, self.out_mean = self.mlp_out_sums
        self.norm = NormWeights(gamma, beta)

    def parts(self) -> tuple[Tensor, ...]:
        """The sums, as tensors that a process adds up with others."""
        return self.w1, self.b1, self.out_g, self.mlp_out_sums

    def named(self, named: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
        """The gradients of mlp_in, mlp_norm, mlp_out and norm by the parameters' names.

        None is a view of another, which an operator must not return.

        Args:
            named: the graph network's parameters by name.
            layer: the layer's number.
        """
        prefix = f"layers.{layer}.edge"
        gamma4, beta4, w2 = (
            named[f"{prefix}.{name}"] for name in ("mlp_norm.weight", "mlp_norm.bias", "mlp_out.weight")
        )
        normalized = self.out_g.sub_(self.out_mean[:, None])  # Σ ds ⊗ (g - μ) / σ
        gamma, beta, out, _ = torch.unbind_copy(self.mlp_out_sums)
        return {
            f"{prefix}.mlp_in.weight": self.w1,
            f"{prefix}.mlp_in.bias": self.b1,
            f"{prefix}.mlp_out.weight": (normalized * gamma4).addcmul_(out[:, None], beta4),
            f"{prefix}.mlp_out.bias": out,
            f"{prefix}.mlp_norm.weight": (w2 * normalized).sum(dim=0),
            f"{prefix}.mlp_norm.bias": torch.mv(w2.T, out),
            f"{prefix}.norm.weight": gamma,
            f"{prefix}.norm.bias": beta,
        }
