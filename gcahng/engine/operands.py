"""What the operators of a training step take and return: their flat arguments and results, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gcahng.reference.synthetic import PAPER


class PassInputs(NamedTuple):
    """The tensors that a pass takes.

    Attributes:
        z: embeddings (n, D) in canonical order.
        classes: labels of the batch's classes (C,).
        pull: exp(−α / J̄_m), 0-dim.
        u: mixing draws (K, K − 1).
        draw: number of the pass, 0-dim int64.
        parameters: the graph network's parameters (see parameter_list).
        buffers: the buffers of its BatchNorms (see buffer_list).
    """

    z: Tensor
    classes: Tensor
    pull: Tensor
    u: Tensor
    draw: Tensor
    parameters: list[Tensor]
    buffers: list[Tensor]


class Settings(NamedTuple):
    """What a pass needs beside tensors; plain values, so that torch can trace them.

    Attributes:
        layers: layers L.
        heads: heads H.
        views: samples of a class, K.
        p: chance that dropout drops an attention weight.
        seed: of dropout.
        symmetric: whether both directions of an edge share a draw, so that half of the pairs are computed.
        training: whether BatchNorms normalize by the batch's statistics.
        momentum: of the BatchNorms.
        eps: of the BatchNorms.
        compute: dtype of products, by name.
        implementation: that of the stages, as gcahng.dispatch names it.
        edge_memory: auto, store, hidden or recompute; see gcahng.EngineOptions.
        edge_dtype: dtype of stored edges, by name.
        graphs: number of the gcahng.engine.cuda_graph.GraphCache that holds the captured pass; 0 if it is not captured.
        ranks: number of the gcahng.engine.ranks.Ranks that share the batch; 0 if this process works alone.
        pairing: how J_syn is formed (see gcahng.reference.synthetic.Synthetic), as all that follows.
        anchor_gradient: whether J_syn moves anchors and positives.
        temperature: of J_syn's cosines.
    """

    layers: int
    heads: int
    views: int
    p: float
    seed: int
    symmetric: bool
    training: bool
    momentum: float
    eps: float
    compute: str
    implementation: str
    edge_memory: str
    edge_dtype: str
    graphs: int
    ranks: int
    pairing: str = PAPER.pairing
    anchor_gradient: bool = PAPER.anchor_gradient
    temperature: float = PAPER.temperature


class Wanted(NamedTuple):
    """Which gradients of phase 1 are wanted.

    Attributes:
        want_z: those for the embeddings.
        want_parameters: those for the graph network's parameters.
    """

    want_z: bool
    want_parameters: bool


class MetricOutputs(NamedTuple):
    """What phase 1 returns.

    Attributes:
        synthetic: J_syn, not yet weighted, 0-dim.
        entropy: J_gce, 0-dim.
        statistics: running mean, variance and count of the edge BatchNorm, then of the node BatchNorm.
        dz_synthetic: gradient of J_syn for z (n, D); empty if it is not wanted.
        dz_entropy: gradient of J_gce for z (n, D); empty if it is not wanted.
        gradients: of J_gce for the parameters that metric_names lists; an empty list if they are not wanted.
    """

    synthetic: Tensor
    entropy: Tensor
    statistics: list[Tensor]
    dz_synthetic: Tensor
    dz_entropy: Tensor
    gradients: list[Tensor]

    def flat(self) -> list[Tensor]:
        """The flat list that the operator returns."""
        losses, dz = (self.synthetic, self.entropy), (self.dz_synthetic, self.dz_entropy)
        return [*losses, *self.statistics, *dz, *self.gradients]


def metric_outputs(flat: Sequence[Any]) -> MetricOutputs:
    """Names what the operator returned, or the gradients of it."""
    losses, statistics, dz, gradients = flat[:2], flat[2:8], flat[8:10], flat[10:]
    return MetricOutputs(*losses, list(statistics), *dz, list(gradients))


class GeneratorOutputs(NamedTuple):
    """What phase 3 returns.

    Attributes:
        values: cross entropy before its factor, J_sim and J_div, 0-dim each.
        statistics: as in MetricOutputs.
        gradients: of J_gen for the parameters that generator_names lists; an empty list if they are not wanted.
    """

    values: list[Tensor]
    statistics: list[Tensor]
    gradients: list[Tensor]

    def flat(self) -> list[Tensor]:
        """The flat list that a captured pass returns."""
        return [*self.values, *self.statistics, *self.gradients]


def generator_outputs(flat: Sequence[Tensor]) -> GeneratorOutputs:
    """Names what a captured pass returned."""
    return GeneratorOutputs(list(flat[:3]), list(flat[3:9]), list(flat[9:]))
