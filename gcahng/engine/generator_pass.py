"""Phase 3 of a training step: the generator's losses, whose gradients reach the network through θ alone.

The losses and their gradients are formed together, one tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcahng.engine.differentiable_once import differentiable_once
from gcahng.engine.graph import GraphPass
from gcahng.engine.operands import GeneratorOutputs, PassInputs, Settings, generator_outputs
from gcahng.engine.prepare import prepare, replayable
from gcahng.engine.schedule import Band, Tile
from gcahng.engine.stages.common import Edges
from gcahng.engine.stages.cross_entropy import LOGITS_AT_ONCE, CrossEntropyInputs
from gcahng.engine.stages.diversity import DiversitySums
from gcahng.engine.stages.head import HeadGradients
from gcahng.engine.stages.mix import Mixing, mix_index
from gcahng.engine.stages.similarity import SimilarityInputs
from gcahng.engine.weights import generator_names, parameter_names
from gcahng.engine.workspace import Workspace
from gcahng.reference.training_step import GeneratorWeights


class GeneratorTask(NamedTuple):
    """What the pass is to compute.

    Attributes:
        weight: the classifier's weight (M, D).
        bias: its bias (M,).
        zeroed: similarities that do not count, (K, C, C) bool; None stands for those with a = c.
        weights: weights of the three losses.
        record: whether the gradients of the generator's parameters are wanted.
    """

    weight: Tensor
    bias: Tensor
    zeroed: Tensor | None
    weights: GeneratorWeights
    record: bool


@replayable
def generator_pass(inputs: PassInputs, s: Settings, task: GeneratorTask, workspace: Workspace) -> GeneratorOutputs:
    """Forms J_gen's parts, and the gradients of the generator's parameters if they are wanted.

    Args:
        inputs: the pass's tensors.
        s: everything else.
        task: what the losses compare with, how they are weighted, and whether gradients are wanted.
        workspace: memory for the stages.
    """
    graph, mixing, statistics = prepare(inputs, s, workspace, record=task.record, update=s.training)
    schedule, z = graph.schedule, graph.z
    graph.node_statistics(graph.forward())
    diversity = _DiversityLoss(graph, task.weights.diversity)
    losses = _Losses(_NegativeLosses(graph, task, inputs.classes), diversity, mixing)
    negatives = losses.negatives
    sums = HeadGradients(graph.dim, z)
    for tile in schedule.tiles:
        dy = _head_gradient(graph, losses, tile, graph.edge(graph.layers, tile), sums)
        if graph.record and graph.stored:
            graph.rows(graph.gradient_buffer(), tile).copy_(dy)
    schedule.complete(negatives.entropy, negatives.dissimilarity)
    gradients = []
    if graph.record:
        schedule.complete(*sums.parts())
        graph.gradients |= sums.named(graph.head_weights)
        negatives.counting = False
        top = _top_gradient(graph, losses, sums if graph.options.training else None)
        graph.backward(None, graph.layers - 1, top, want_z=False)
        gradients = [graph.gradients[name] for name in generator_names(s.layers)]
    count = schedule.views * schedule.classes**2
    values = (negatives.entropy / count, negatives.dissimilarity / count, diversity.value)
    return GeneratorOutputs([value.to(z.dtype) for value in values], statistics, gradients)


# -- the losses


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

    def __init__(self, graph: GraphPass, task: GeneratorTask, classes: Tensor) -> None:
        self._stages, self._schedule, self._zeroed, self._classes = graph.stages, graph.schedule, task.zeroed, classes
        self._nodes = graph.z.contiguous()
        self._want, self._compute = graph.record, graph.options.compute
        self._weight, self._bias = task.weight.to(self._compute), task.bias
        count = graph.schedule.views * graph.schedule.classes**2
        self._soft, self._similarity = task.weights.soft / count, task.weights.similarity / count
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
        index, zeroed = mix_index(self._schedule, tile, negatives.device), self._zeroed
        dn = self._entropy(negatives, self._classes[index.negative])
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


# -- for autograd, which has it run eagerly


class GeneratorPass(torch.autograd.Function):
    """J_gen, its parts and the running statistics, as a function of the graph network's parameters."""

    @staticmethod
    def forward(ctx: Any, inputs: PassInputs, s: Settings, task: GeneratorTask, *parameters: Tensor) -> Any:
        """Runs phase 3.

        Args:
            ctx: of autograd.
            inputs: the pass's tensors, without parameters: autograd needs those as arguments of their own.
            s: everything else.
            task: what is to be computed; autograd says whether gradients are wanted.
            parameters: the graph network's parameters (see parameter_list).
        """
        task = task._replace(record=any(ctx.needs_input_grad))
        out = generator_outputs(generator_pass(inputs._replace(parameters=list(parameters)), s, task))
        ctx.layers, ctx.gradients = s.layers, out.gradients
        ctx.mark_non_differentiable(*out.values, *out.statistics)
        weights, (entropy, dissimilarity, diversity) = task.weights, out.values
        total = weights.soft * entropy + weights.similarity * dissimilarity + weights.diversity * diversity
        return total, *out.values, *out.statistics

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_: Any) -> Any:
        """Scales the parameters' gradients in place, which saves their memory but allows one backward only."""
        if ctx.gradients is None:
            raise RuntimeError(
                "the generator pass has run its backward already, which scales its gradients in place; run it anew"
            )
        scaled = differentiable_once(
            "the engine", lambda *g: tuple(x.mul_(g[-1]) for x in g[:-1]), *ctx.gradients, d_total
        )
        ctx.gradients = None
        named = dict(zip(generator_names(ctx.layers), scaled, strict=False))
        return None, None, None, *(named.get(name) for name in parameter_names(ctx.layers))
