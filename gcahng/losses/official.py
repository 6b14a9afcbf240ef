"""Reads the authors' checkpoints, and writes weights that the authors' code can read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.losses.state import check_tensor, some
from gcahng.nn import GraphAblation

if TYPE_CHECKING:
    from gcahng.losses.gca_hng import GCAHNGLoss

_NODE = {
    "query": "att.q_linear",
    "key": "att.k_linear",
    "value": "att.v_linear",
    "output": "att.out",
    "edge_to_node": "edge_to_node",
    "mlp_in": "linear1",
    "mlp_out": "linear2",
    "norm": "norm.1",
}
_EDGE = {
    "query": "att.q_linear",
    "key": "att.k_linear",
    "value": "att.v_linear",
    "node_to_edge": "node_to_edge",
    "norm": "norm.1",
    "mlp_in": "linear.0",
    "mlp_norm": "linear.2",
    "mlp_out": "linear.3",
}
_HEADS = {
    "graph_network.node_input": "gnn.dim_red",
    "graph_network.edge_batch_norm": "gnn.bottleneck1.0",
    "graph_network.node_batch_norm": "gnn.bottleneck2.0",
    "graph_network.coefficient_head": "gnn.fc.0",
    "graph_network.class_head": "gnn.cls.0",
    "classifier": "softmax_classifier",
}


def _names(gca: GCAHNGLoss) -> Iterator[tuple[str, Tensor]]:
    """The authors' name and our tensor for everything that their checkpoints hold of the loss.

    Raises:
        UserError: the loss's graph network leaves something out that they hold.
    """
    ablation = gca.graph_network.ablation
    if ablation != GraphAblation():
        raise UserError(
            f"coefficients is {ablation.coefficients!r} and message_passing {ablation.message_passing}; for the "
            "authors' checkpoints they must be 'channel' and True"
        )
    modules = dict(_HEADS)
    for number, layer in enumerate(gca.graph_network.layers):
        ours = f"graph_network.layers.{number}"
        node, edge = f"gnn.gnn.{number}.node_model.layers.0", f"gnn.gnn.{number}.edge_model"
        modules |= {f"{ours}.node.{name}": f"{node}.{official}" for name, official in _NODE.items()}
        modules |= {f"{ours}.edge.{name}": f"{edge}.{official}" for name, official in _EDGE.items()}
        yield f"{node}.update_node.weight", layer.node.update_node_weight
        yield f"{node}.update_node.bias", layer.node.update_node_bias
    for ours, official in modules.items():
        module = gca.get_submodule(ours)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield f"{official}.{name}", tensor


def official_state_dict(gca: GCAHNGLoss) -> dict[str, Tensor]:
    """Copies the loss's weights under the authors' names.

    Args:
        gca: the loss.

    Returns:
        All `gnn.*` and `softmax_classifier.*` entries of an authors' checkpoint, the unused `update_node` included.

    Raises:
        UserError: the loss's graph network leaves something out that they hold.
    """
    return {name: tensor.detach().clone() for name, tensor in _names(gca)}


def load_official_state_dict(gca: GCAHNGLoss, state_dict: Mapping[str, Tensor]) -> None:
    """Copies an authors' checkpoint into the loss.

    `feature_extractor.*` is ignored, and everything else must fit. Optimizers and running means are not in such a
    checkpoint and stay as they are.

    Args:
        gca: the loss.
        state_dict: the checkpoint, as torch.load returns it.

    Raises:
        UserError: names are missing or unexpected, shapes do not fit, or the loss's graph network leaves something out.
            Nothing is changed then.
    """
    if not isinstance(state_dict, Mapping):
        raise UserError(
            f"state_dict is a {type(state_dict).__name__}; it must be a dict of tensors, as torch.load gives"
        )
    if strange := [name for name in state_dict if not isinstance(name, str)]:
        raise UserError(f"state_dict has an entry {strange[0]!r}; its names must be strings, as torch.load gives")
    wanted = dict(_names(gca))
    tensors = {name: tensor for name, tensor in state_dict.items() if not name.startswith("feature_extractor.")}
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unexpected:
        raise UserError(
            f"state_dict does not fit this loss (layers={len(gca.graph_network.layers)}): "
            f"missing {some(missing)}, unexpected {some(unexpected)}"
        )
    for name, own in wanted.items():
        check_tensor(name, tensors[name], own)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])
