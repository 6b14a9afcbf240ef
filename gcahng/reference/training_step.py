"""The two passes of a training step over the graph of a batch, and the generation of negatives.

Every implementation of the loss has these three functions: metric_pass, generator_pass and generate. The engine has
them as methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.reference import similarity
from gcahng.reference.cross_entropy import negative_entropy
from gcahng.reference.diversity import diversity
from gcahng.reference.edge_update import Dropout
from gcahng.reference.graph_network import graph_network
from gcahng.reference.mix import mix
from gcahng.reference.synthetic import PAPER, Synthetic, synthetic_loss

if TYPE_CHECKING:
    from gcahng.nn import GraphNetwork


class Batch(NamedTuple):
    """One batch in canonical order: classes by ascending label, the views of a class side by side in their old order.

    Attributes:
        z: embeddings (n, D).
        classes: labels in ascending order (C,).
        views: samples of a class, K; n = C·K.
        pull: exp(-α / J̄_m), 0-dim.
        u: mixing draws (K, K-1).
        dropout: dropout of the edges' attention weights, or None.
        training: whether the BatchNorms normalize by batch statistics rather than by the running ones.
    """

    z: Tensor
    classes: Tensor
    views: int
    pull: Tensor
    u: Tensor
    dropout: Dropout | None
    training: bool

    def labels(self) -> Tensor:
        """Labels (n,) in canonical order.

        This is no property, since torch.compile of torch 2.10 does not trace one of a NamedTuple.
        """
        return self.classes.repeat_interleave(self.views)

    def by_view(self) -> Tensor:
        """Embeddings (K, C, D), view k of class a."""
        return self.z.view(-1, self.views, self.z.shape[1]).transpose(0, 1)


class MetricLosses(NamedTuple):
    """The losses of phase 1 that the graph network forms.

    Attributes:
        synthetic: J_syn before its weight, 0-dim.
        node_entropy: J_gce, 0-dim.
    """

    synthetic: Tensor
    node_entropy: Tensor


class GeneratorWeights(NamedTuple):
    """The weights in J_gen = soft · CE + similarity · J_sim + diversity · J_div.

    Attributes:
        soft: of the cross entropy.
        similarity: of J_sim.
        diversity: of J_div.
    """

    soft: float
    similarity: float
    diversity: float


class GeneratorLosses(NamedTuple):
    """The losses of phase 3, of which only `total` is differentiated.

    Attributes:
        total: J_gen, 0-dim.
        negative_entropy: cross entropy on the negatives before its factor, 0-dim.
        dissimilarity: J_sim, 0-dim.
        diversity: J_div, 0-dim.
    """

    total: Tensor
    negative_entropy: Tensor
    dissimilarity: Tensor
    diversity: Tensor


def coefficients_by_view(coefficients: Tensor, views: int) -> Tensor:
    """θ (n, n, D) in canonical order as (K, C, K, C, D): anchor view and class, negative view and class."""
    n, _, dim = coefficients.shape
    return coefficients.view(n // views, views, n // views, views, dim).permute(1, 0, 3, 2, 4)


def _negatives(batch: Batch, coefficients: Tensor, anchor_gradient: bool = True) -> Tensor:
    """The batch's synthetic negatives (K, C, C, D) for θ (n, n, D)."""
    by_view = coefficients_by_view(coefficients.to(batch.z.dtype), batch.views)
    return mix(batch.by_view(), by_view, batch.u, batch.pull, anchor_gradient=anchor_gradient)


def metric_pass(network: GraphNetwork, batch: Batch, synthetic: Synthetic = PAPER) -> MetricLosses:
    """Runs phase 1, whose losses train the embedding.

    θ is held fixed, so that gradients reach z and the node side of the network.

    Args:
        network: parameters; the running statistics are updated in training.
        batch: the batch.
        synthetic: how J_syn is formed.
    """
    graph = graph_network(network, batch.z, batch.labels(), training=batch.training, dropout=batch.dropout)
    node_entropy = F.cross_entropy(graph.node_logits, batch.labels())
    with torch.autocast(batch.z.device.type, enabled=False):
        negatives = _negatives(batch, graph.coefficients.detach(), synthetic.anchor_gradient)
        views = batch.by_view() if synthetic.anchor_gradient else batch.by_view().detach()
        return MetricLosses(synthetic_loss(synthetic, views, negatives, batch.classes), node_entropy)


def generator_pass(
    network: GraphNetwork,
    classifier: nn.Linear,
    batch: Batch,
    official_order: Tensor | None,
    weights: GeneratorWeights,
) -> GeneratorLosses:
    """Runs phase 3, whose losses train the generator through θ alone. z and the classifier are held fixed.

    Args:
        network: parameters; the running statistics are updated in training.
        classifier: from D channels to M classes.
        batch: the batch.
        official_order: each class's place among the batch's classes by first appearance (C,), to zero the similarities
            that the authors' code zeroes; None to zero those with a = c.
        weights: of the losses.
    """
    batch = batch._replace(z=batch.z.detach())
    graph = graph_network(network, batch.z, batch.labels(), training=batch.training, dropout=batch.dropout)
    with torch.autocast(batch.z.device.type, enabled=False):
        coefficients = graph.coefficients.to(batch.z.dtype)
        negatives = _negatives(batch, coefficients)
        if official_order is None:
            zeroed = similarity.own_entries(batch.views, batch.classes.shape[0], batch.z.device)
        else:
            zeroed = similarity.official_own_entries(batch.views, official_order)
        j_sim = similarity.dissimilarity(batch.by_view(), negatives, zeroed)
        j_div = diversity(coefficients)
    entropy = negative_entropy(classifier, negatives, batch.classes)
    total = weights.soft * entropy + weights.similarity * j_sim + weights.diversity * j_div
    return GeneratorLosses(total, entropy, j_sim, j_div)


def generate(network: GraphNetwork, batch: Batch, anchors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Generates a batch's negatives without changing any state.

    Args:
        network: parameters.
        batch: the batch.
        anchors: places (A,) of the classes whose samples are anchors; None for all.

    Returns:
        Negatives (K, A, C, D) and coefficients (A·K, n, D).
    """
    with torch.no_grad():
        graph = graph_network(
            network, batch.z, batch.labels(), training=batch.training, dropout=batch.dropout, update=False
        )
        return generated(batch, graph.coefficients, anchors)


def generated(batch: Batch, coefficients: Tensor, anchors: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `generate` returns, from the coefficients θ (n, n, D) of every ordered pair."""
    with torch.autocast(batch.z.device.type, enabled=False):
        negatives = _negatives(batch, coefficients)
    if anchors is None:
        return negatives, coefficients
    rows = (anchors[:, None] * batch.views + torch.arange(batch.views, device=anchors.device)).flatten()
    return negatives[:, anchors], coefficients[rows]
