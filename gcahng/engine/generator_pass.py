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
from gcahng.engine.schedule import Tile, bands_of, totals
from gcahng.engine.stages.common import Edges
from gcahng.engine.stages.cross_entropy import LOGITS_AT_ONCE, CrossEntropyInputs
from gcahng.engine.stages.diversity import DiversitySums
from gcahng.engine.stages.head import HeadGradients
from gcahng.engine.stages.mix import Mixing
from gcahng.engine.stages.mix_index import batch_mixes, by_tile
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
        room = graph.gradient_room(tile) if graph.record else None
        dy = _head_gradient(graph, losses, tile, graph.edge(graph.layers, tile), sums, room)
        if graph.record:
            graph.leave_gradient(tile, dy)
    sums_of_negatives = negatives.totals()
    schedule.complete(sums_of_negatives)
    gradients = []
    if graph.record:
        schedule.complete(*sums.parts())
        graph.gradients |= sums.named(graph.head_weights)
        sums.close(schedule.nodes**2)
        top = _top_gradient(graph, losses, sums if graph.options.training else None)
        graph.backward(None, graph.layers - 1, top, want_z=False)
        gradients = [graph.gradients[name] for name in generator_names(s.layers)]
    count = schedule.views * schedule.classes**2
    entropy, dissimilarity = torch.unbind_copy((sums_of_negatives / count).to(z.dtype))
    return GeneratorOutputs([entropy, dissimilarity, diversity.value.to(z.dtype)], statistics, gradients)


# -- the losses


class _Losses(NamedTuple):
    """The losses of a pass, and the mixing that makes the negatives."""

    negatives: _NegativeLosses
    diversity: _DiversityLoss
    mixing: Mixing


def _head_gradient(
    graph: GraphPass,
    losses: _Losses,
    tile: Tile,
    e: Edges,
    sums: HeadGradients | None,
    room: Tensor | None = None,
) -> Tensor | None:
    """Forms a tile's losses, and returns dy (T, D), the gradient of the edge BatchNorm's output, or None if no gradient
    is recorded. It may lie in `room` (T, D), if that is given."""
    stages = graph.stages
    theta = graph.coefficients(e)
    dn = losses.negatives.form(tile, stages.mix.negatives(losses.mixing, tile, theta))
    if dn is None:
        return None
    dtheta = stages.mix.backward_theta(losses.mixing, tile, dn)
    losses.diversity.add_gradient(tile, theta, dtheta)
    return stages.head.backward(graph.head_weights, e, theta, dtheta, sums, room)


def _top_gradient(graph: GraphPass, losses: _Losses, sums: HeadGradients | None) -> Callable[[Tile, Edges], Tensor]:
    """The function from a tile and the edges that leave the last layer to their gradient."""

    def gradient(tile: Tile, e: Edges) -> Tensor:
        dy = graph.gradient_of(tile) if graph.stored else _head_gradient(graph, losses, tile, e, None)
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
        sums = DiversitySums(graph.stages.context)
        for tile in schedule.tiles:
            self._stage.forward(tile, graph.coefficients(graph.edge(graph.layers, tile)), sums)
        n = schedule.nodes
        sum_of, square_of = totals(sums.sum, sums.square)
        mean, square = sum_of / n, square_of.sum(dtype=torch.float64)
        # Where all rows of θ are alike the difference is rounding, and may be negative; θ's own rounding is the least.
        least = graph.dim * (torch.finfo(z.dtype).eps / 2) ** 2
        deviation = torch.sqrt((square / n**2 - mean.double().square().sum() / n).clamp_min(least))
        self.value = 0.01 * (1 - deviation)
        shifted = graph.stages.context.wrapped("mean", graph.dim)
        torch.add(mean, 0.5, out=shifted.head)
        (self._mean,) = bands_of(schedule, shifted)
        self._scale = (-0.01 * weight / (n**2 * deviation)).to(z.dtype)

    def add_gradient(self, tile: Tile, theta: Tensor, into: Tensor) -> None:
        """Adds weight · ∂J_div/∂θ_ij = -0.01 weight (θ_ij - m_i) / (n² √(S/n²)), both directions of an edge."""
        self._stage.backward(tile, theta, self._mean, self._scale, into)


class _NegativeLosses:
    """J_soft and J_sim on a tile's negatives, values and gradients together.

    The classifier's logits exist for a few rows at a time. The losses of all mixes are added up at the end.
    """

    def __init__(self, graph: GraphPass, task: GeneratorTask, classes: Tensor) -> None:
        self._stages, schedule = graph.stages, graph.schedule
        self._nodes = graph.z.contiguous()
        self._want, self._compute = graph.record, graph.options.compute
        self._weight, self._bias = task.weight, task.bias
        if self._weight.dtype is not self._compute:
            self._weight = self._weight.to(self._compute)
        count = schedule.views * schedule.classes**2
        self._soft, self._similarity = task.weights.soft / count, task.weights.similarity / count
        mixes = batch_mixes(graph.stages.context)
        counted = mixes.others if task.zeroed is None else ~task.zeroed.reshape(-1)[mixes.place]
        labels = classes[mixes.negative]
        self._losses = graph.z.new_empty(2, len(mixes.place))  # J_soft's and J_sim's of each mix
        entropy, dissimilarity = self._losses
        lists = (labels, mixes.node, counted, entropy, dissimilarity)
        self._labels, self._node, self._counted, self._entropy_of, self._dissimilarity_of = (
            by_tile(schedule, x) for x in lists
        )

    def totals(self) -> Tensor:
        """The sums of the cross entropies and of 1 − cos(a, N) over all mixes, (2,) float64."""
        return self._losses.sum(dim=1, dtype=torch.float64)

    def form(self, tile: Tile, negatives: Tensor) -> Tensor | None:
        """Forms the losses of a tile's negatives.

        Args:
            tile: where they lie.
            negatives: N (mixes, D).

        Returns:
            dN (mixes, D), or None if no gradient is recorded.
        """
        dn = self._entropy(negatives, self._labels[tile], self._entropy_of[tile])
        inputs = SimilarityInputs(self._nodes, self._node[tile], negatives, self._counted[tile], self._similarity)
        self._stages.similarity.forward(inputs, self._dissimilarity_of[tile], dn)
        return dn

    def _entropy(self, negatives: Tensor, labels: Tensor, losses: Tensor) -> Tensor | None:
        """The part of `form` that is J_soft's."""
        dn = self._stages.context.wide("dn", *negatives.shape) if self._want else None
        step = max(1, LOGITS_AT_ONCE // self._weight.shape[0])
        if step >= len(negatives):
            self._entropy_at_once(negatives, labels, losses, dn)
        else:
            parts = (negatives, labels, losses, *(() if dn is None else (dn,)))
            for part, label, loss, *rest in zip(*(x.split(step) for x in parts), strict=True):
                self._entropy_at_once(part, label, loss, rest[0] if rest else None)
        return dn

    def _entropy_at_once(self, negatives: Tensor, labels: Tensor, losses: Tensor, dn: Tensor | None) -> None:
        """J_soft of as many negatives as may have their logits in memory at once."""
        context, stage = self._stages.context, self._stages.cross_entropy
        if not context.same:
            negatives = context.scratch("negatives low", *negatives.shape).copy_(negatives)
        inputs = CrossEntropyInputs(stage.logits(negatives, self._weight), self._bias, labels, self._soft)
        d = stage.forward(inputs, losses, self._want)
        if dn is not None:
            context.product(dn, d, self._weight, add=False)


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
        scaled = differentiable_once("the engine", _scale, *ctx.gradients, d_total)
        ctx.gradients = None
        named = dict(zip(generator_names(ctx.layers), scaled, strict=True))
        return None, None, None, *(named.get(name) for name in parameter_names(ctx.layers))


def _scale(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Multiplies gradients in place with the upstream gradient, which comes last."""
    *gradients, d_total = tensors
    torch._foreach_mul_(gradients, d_total)
    return tuple(gradients)
