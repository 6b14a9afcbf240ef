"""Phase 3 of a training step: the generator's losses, whose gradients reach the network through θ alone.

The losses and their gradients are formed together, one tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.graph import GraphPass
from gcahng.engine.schedule import Band, Tile
from gcahng.engine.stages.common import Edges
from gcahng.engine.stages.cross_entropy import CrossEntropyInputs
from gcahng.engine.stages.diversity import DiversitySums
from gcahng.engine.stages.head import HeadGradients
from gcahng.engine.stages.mix import Mixing, mix_index
from gcahng.engine.stages.similarity import SimilarityInputs
from gcahng.reference.training_step import GeneratorWeights

LOGITS_AT_ONCE = 1 << 22


class GeneratorTargets(NamedTuple):
    """What the generator's losses compare with, and how they are weighted.

    Attributes:
        classes: (C,) labels of the batch's classes.
        classifier: the classifier's weight (M, D) and bias (M,).
        zeroed: similarities that do not count, (K, C, C) bool; None stands for those with a = c.
        weights: weights of the three losses.
    """

    classes: Tensor
    classifier: tuple[Tensor, Tensor]
    zeroed: Tensor | None
    weights: GeneratorWeights


class GeneratorResult(NamedTuple):
    """What the phase returns.

    Attributes:
        negative_entropy: cross entropy on the negatives before its factor, 0-dim.
        dissimilarity: J_sim, 0-dim.
        diversity: J_div, 0-dim.
        parameters: gradients of J_gen, by the parameters' names; empty if the pass records none.
    """

    negative_entropy: Tensor
    dissimilarity: Tensor
    diversity: Tensor
    parameters: dict[str, Tensor]


def generator_pass(graph: GraphPass, mixing: Mixing, targets: GeneratorTargets) -> GeneratorResult:
    """Forms J_gen's parts, and the gradients of the generator's parameters if the pass records them.

    Args:
        graph: a pass that has not run yet.
        mixing: how the batch's negatives are mixed.
        targets: what the losses compare with.
    """
    schedule, z = graph.schedule, graph.z
    graph.node_statistics(graph.forward())
    diversity = _DiversityLoss(graph, targets.weights.diversity)
    losses = _Losses(_NegativeLosses(graph, targets), diversity, mixing)
    negatives = losses.negatives
    sums = HeadGradients(graph.dim, z)
    for tile in schedule.tiles:
        dy = _head_gradient(graph, losses, tile, graph.edge(graph.layers, tile), sums)
        if graph.record and graph.stored:
            graph.rows(graph.gradient_buffer(), tile).copy_(dy)
    schedule.complete(negatives.entropy, negatives.dissimilarity)
    if graph.record:
        schedule.complete(*sums.parts())
        graph.gradients |= sums.named(graph.head_weights)
        negatives.counting = False
        top = _top_gradient(graph, losses, sums if graph.options.training else None)
        graph.backward(None, graph.layers - 1, top, want_z=False)
    count = schedule.views * schedule.classes**2
    values = (negatives.entropy / count, negatives.dissimilarity / count, diversity.value)
    return GeneratorResult(*(value.to(z.dtype) for value in values), graph.gradients)


class _Losses(NamedTuple):
    """The losses of a pass, and the mixing that makes the negatives."""

    negatives: _NegativeLosses
    diversity: _DiversityLoss
    mixing: Mixing


def _head_gradient(
    graph: GraphPass, losses: _Losses, tile: Tile, e: Edges, sums: HeadGradients | None
) -> Tensor | None:
    """Adds a tile's losses up, and returns dy (T, D), the gradient of the edge BatchNorm's output, or None if no
    gradient is recorded."""
    stages = graph.stages
    theta = graph.coefficients(e)
    dn = losses.negatives.add(tile, stages.mix.negatives(losses.mixing, tile, theta))
    if dn is None:
        return None
    dtheta = stages.mix.backward_theta(losses.mixing, tile, dn)
    losses.diversity.add_gradient(tile, theta, dtheta)
    return stages.head.backward(graph.head_weights, e, theta, dtheta, sums)


def _top_gradient(graph: GraphPass, losses: _Losses, sums: HeadGradients | None) -> Callable[[Tile, Edges], Tensor]:
    """The function from a tile and the edges that leave the last layer to their gradient."""

    def gradient(tile: Tile, e: Edges) -> Tensor:
        if graph.stored:
            dy = graph.rows(graph.gradient_buffer(), tile).to(e.full.dtype)
        else:
            dy = _head_gradient(graph, losses, tile, e, None)
        return graph.stages.head.norm_backward(tile, graph.head_weights, e, dy, sums)

    return gradient


class _DiversityLoss:
    """J_div and its gradient.

    They follow from the row means of θ and from Σθ², which a sweep of their own gathers. The sums are over θ − ½, since
    θ is close to ½.

    Attributes:
        value: J_div, 0-dim float64.
    """

    def __init__(self, graph: GraphPass, weight: float) -> None:
        self._stage, schedule, z = graph.stages.diversity, graph.schedule, graph.z
        sums = DiversitySums(schedule, graph.dim, z)
        for tile in schedule.tiles:
            self._stage.forward(tile, graph.coefficients(graph.edge(graph.layers, tile)), sums)
        n = schedule.nodes
        mean, square = sums.sum.total() / n, sums.square.total().sum(dtype=torch.float64)
        # Where all rows of θ are alike the difference is rounding, and may be negative; θ's own rounding is the least.
        least = graph.dim * (torch.finfo(z.dtype).eps / 2) ** 2
        deviation = torch.sqrt((square / n**2 - mean.double().square().sum() / n).clamp_min(least))
        self.value = 0.01 * (1 - deviation)
        self._mean = Band(schedule, mean + 0.5)
        self._scale = (-0.01 * weight / (n**2 * deviation)).to(z.dtype)

    def add_gradient(self, tile: Tile, theta: Tensor, into: Tensor) -> None:
        """Adds weight · ∂J_div/∂θ_ij = -0.01 weight (θ_ij - m_i) / (n² √(S/n²)), both directions of an edge."""
        self._stage.backward(tile, theta, self._mean, self._scale, into)


class _NegativeLosses:
    """J_soft and J_sim on a tile's negatives, values and gradients together.

    The classifier's logits exist for a few rows at a time.

    Attributes:
        entropy: the sum of the negatives' cross entropies so far, 0-dim float64.
        dissimilarity: the sum of 1 − cos(a, N) so far, 0-dim float64.
        counting: whether `add` adds to these sums; a second sweep must not count them again.
    """

    def __init__(self, graph: GraphPass, targets: GeneratorTargets) -> None:
        self._stages, self._schedule, self._targets = graph.stages, graph.schedule, targets
        self._nodes = graph.z.contiguous()
        self._want, self._compute = graph.record, graph.options.compute
        self._weight, self._bias = targets.classifier[0].to(self._compute), targets.classifier[1]
        count = graph.schedule.views * graph.schedule.classes**2
        self._soft, self._similarity = targets.weights.soft / count, targets.weights.similarity / count
        self.entropy = torch.zeros((), dtype=torch.float64, device=graph.z.device)
        self.dissimilarity = torch.zeros_like(self.entropy)
        self.counting = True

    def add(self, tile: Tile, negatives: Tensor) -> Tensor | None:
        """Adds the losses of a tile's negatives up.

        Args:
            tile: where they lie.
            negatives: N (mixes, D).

        Returns:
            dN (mixes, D), or None if no gradient is recorded.
        """
        index, zeroed = mix_index(self._schedule, tile, negatives.device), self._targets.zeroed
        dn = self._entropy(negatives, self._targets.classes[index.negative])
        counted = ~zeroed[index.place] if zeroed is not None else index.anchor != index.negative
        inputs = SimilarityInputs(self._nodes, index.node, negatives, counted, self._similarity)
        losses = self._stages.similarity.forward(inputs, dn)
        if self.counting:
            self.dissimilarity += losses.sum(dtype=torch.float64)
        return dn

    def _entropy(self, negatives: Tensor, labels: Tensor) -> Tensor | None:
        """The part of `add` that is J_soft's."""
        stage = self._stages.cross_entropy
        dn = torch.empty_like(negatives) if self._want else None
        step = max(1, LOGITS_AT_ONCE // self._weight.shape[0])
        for start in range(0, len(negatives), step):
            part, label = negatives[start : start + step].to(self._compute), labels[start : start + step]
            logits = stage.logits(part, self._weight)
            losses, d = stage.forward(CrossEntropyInputs(logits, self._bias, label, self._soft), self._want)
            if self.counting:
                self.entropy += losses.sum(dtype=torch.float64)
            if dn is not None:
                dn[start : start + step] = torch.mm(d, self._weight)
        return dn
