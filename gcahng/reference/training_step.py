"""The two passes of a training step over the graph of a batch, and the generation of negatives (design: one training
step).

An implementation of the loss has these three functions; the engine has the same ones as methods.
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
from gcahng.reference.npair import synthetic_npair

if TYPE_CHECKING:
    from gcahng.nn import GraphNetwork


class Batch(NamedTuple):
    """One batch in canonical order: classes by ascending label, the views of a class side by side, as they came.

    z (n, D) embeddings; classes (C,) ascending labels; views K with n = C·K; pull = exp(-α / J̄_m), 0-dim; u (K, K-1)
    mixing draws; dropout None for none; training: batch statistics in the BatchNorms (else the running ones).
    """

    z: Tensor
    classes: Tensor
    views: int
    pull: Tensor
    u: Tensor
    dropout: Dropout | None
    training: bool

    def labels(self) -> Tensor:
        """(n,) in canonical order. No property: torch.compile of torch 2.10 does not trace a named tuple's."""
        return self.classes.repeat_interleave(self.views)

    def by_view(self) -> Tensor:
        """Embeddings (K, C, D): view k of class a."""
        return self.z.view(-1, self.views, self.z.shape[1]).transpose(0, 1)


class MetricLosses(NamedTuple):
    """J_syn before its weight, and J_gce, 0-dim each."""

    synthetic: Tensor
    node_entropy: Tensor


class GeneratorWeights(NamedTuple):
    """J_gen = soft · CE + similarity · J_sim + diversity · J_div."""

    soft: float
    similarity: float
    diversity: float


class GeneratorLosses(NamedTuple):
    """total: J_gen, the only one to differentiate; CE before its factor, J_sim and J_div. 0-dim each."""

    total: Tensor
    negative_entropy: Tensor
    dissimilarity: Tensor
    diversity: Tensor


def coefficients_by_view(coefficients: Tensor, views: int) -> Tensor:
    """θ (n, n, D) in canonical order → (K, C, K, C, D): anchor view and class, negative view and class."""
    n, _, dim = coefficients.shape
    return coefficients.view(n // views, views, n // views, views, dim).permute(1, 0, 3, 2, 4)


def _negatives(batch: Batch, coefficients: Tensor) -> Tensor:
    by_view = coefficients_by_view(coefficients.to(batch.z.dtype), batch.views)
    return mix(batch.by_view(), by_view, batch.u, batch.pull)


def metric_pass(network: GraphNetwork, batch: Batch) -> MetricLosses:
    """Phase 1: the losses that train the embedding. θ is held fixed; gradients reach z and the node side of the
    network."""
    graph = graph_network(network, batch.z, batch.labels(), training=batch.training, dropout=batch.dropout)
    node_entropy = F.cross_entropy(graph.node_logits, batch.labels())
    with torch.autocast(batch.z.device.type, enabled=False):
        negatives = _negatives(batch, graph.coefficients.detach())
        return MetricLosses(synthetic_npair(batch.by_view(), negatives), node_entropy)


def generator_pass(
    network: GraphNetwork,
    classifier: nn.Linear,
    batch: Batch,
    official_order: Tensor | None,
    weights: GeneratorWeights,
) -> GeneratorLosses:
    """Phase 3: the losses that train the generator, through θ alone; z and the classifier are held fixed.

    official_order: None, or each class's place among the batch's classes by first appearance, which asks for the
    authors' choice of zeroed similarities.
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
        away = similarity.dissimilarity(batch.by_view(), negatives, zeroed)
        spread = diversity(coefficients)
    entropy = negative_entropy(classifier, negatives, batch.classes)
    total = weights.soft * entropy + weights.similarity * away + weights.diversity * spread
    return GeneratorLosses(total, entropy, away, spread)


def generate(network: GraphNetwork, batch: Batch, anchors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Negatives (K, A, C, D) and coefficients (A·K, n, D), for the A classes at these places (None: all), no state
    touched."""
    with torch.no_grad():
        graph = graph_network(
            network, batch.z, batch.labels(), training=batch.training, dropout=batch.dropout, update=False
        )
        return generated(batch, graph.coefficients, anchors)


def generated(batch: Batch, coefficients: Tensor, anchors: Tensor | None) -> tuple[Tensor, Tensor]:
    """What generate returns, from θ of every ordered pair (n, n, D) in canonical order."""
    with torch.autocast(batch.z.device.type, enabled=False):
        negatives = _negatives(batch, coefficients)
    if anchors is None:
        return negatives, coefficients
    rows = (anchors[:, None] * batch.views + torch.arange(batch.views, device=anchors.device)).flatten()
    return negatives[:, anchors], coefficients[rows]
