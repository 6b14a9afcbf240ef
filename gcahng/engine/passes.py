"""The two passes of a training step and the coefficients of a batch, over tiles. Losses and their gradients are
formed together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.graph import GraphPass
from gcahng.engine.head import DiversitySums, HeadGradients
from gcahng.engine.judge import TorchJudge
from gcahng.engine.mixing import TorchMixer, mix_index
from gcahng.engine.schedule import Band, NodeSum, Schedule, Tile
from gcahng.engine.stages import Edges
from gcahng.reference.losses import L2_WEIGHT
from gcahng.reference.passes import GeneratorWeights

LOGITS_AT_ONCE = 1 << 22

# -- phase 1


class MetricResult(NamedTuple):
    """J_syn (unweighted) and J_gce; gradients of each where asked for: of J_syn for z, of J_gce for z and the
    parameters."""

    synthetic: Tensor
    node_entropy: Tensor
    dz_synthetic: Tensor | None
    dz_entropy: Tensor | None
    parameters: dict[str, Tensor]


def metric_pass(graph: GraphPass, mixer: TorchMixer, classes: Tensor, want_z: bool) -> MetricResult:
    """J_syn with θ held fixed, and J_gce. classes (C,)."""
    schedule, z = graph.schedule, graph.z
    f = graph.forward()
    logits, norms = _synthetic_logits(graph, mixer)
    theta, graph.s[-1] = graph.s[-1], None
    synthetic, dlogits, dz_synthetic = _synthetic_npair(z, schedule, logits, norms, want_z)
    if want_z:
        dz_synthetic += _synthetic_backward(graph, mixer, theta, dlogits)
    graph.buffer = theta  # done with: its memory takes the edges' gradients

    segment = graph.node_head(f)
    labels = classes.repeat_interleave(schedule.views)
    log_p = F.log_softmax(segment.outputs[0].detach().to(z.dtype), dim=1)
    entropy = F.nll_loss(log_p, labels)
    dz = None
    if graph.record:
        d = log_p.exp_()
        d[torch.arange(len(labels), device=d.device), labels] -= 1
        (df,) = segment.backward([d.div_(len(labels))], graph.gradients)
        dz = graph.backward(df, graph.layers - 2, None, want_z)
    return MetricResult(synthetic, entropy, dz_synthetic, dz, graph.gradients)


def _synthetic_logits(graph: GraphPass, mixer: TorchMixer) -> tuple[Tensor, Tensor]:
    """Logits a·N (K, C, C) and Σ‖N‖² over a ≠ c. Where edges are stored, θ takes the place of the last ones, which
    nothing else needs: here they get no gradient."""
    schedule = graph.schedule
    logits = schedule.room(graph.z, schedule.views, schedule.classes, schedule.classes)
    norms = torch.zeros((), dtype=torch.float64, device=graph.z.device)
    for number, tile in enumerate(schedule.tiles):
        coefficients = graph.coefficients(graph.edge(graph.layers, number, tile))
        if graph.stored:
            graph.rows(graph.s[-1], tile).copy_(coefficients)
        index = mix_index(schedule, tile, logits.device)
        found, squares = mixer.logits(tile, coefficients)
        logits[index.place] = found
        norms += (squares * (index.anchor != index.negative)).sum()
    schedule.complete(logits, norms)
    return logits, norms


def _synthetic_npair(
    z: Tensor, schedule: Schedule, logits: Tensor, norms: Tensor, want_z: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """J_syn, d of the logits (diagonal zeroed), and dz of what is no synthetic negative: positives and the anchors'
    norms."""
    views, classes = schedule.views, schedule.classes
    x = z.view(classes, views, -1)
    positive = x.roll(-1, dims=1)
    logits.diagonal(dim1=1, dim2=2).copy_((x * positive).sum(dim=-1).T)
    log_p = F.log_softmax(logits, dim=2)
    entropy = -log_p.diagonal(dim1=1, dim2=2).mean()
    own = x.square().sum()
    loss = entropy + L2_WEIGHT / views * (own / classes + (norms + own) / classes**2).to(z.dtype)
    if not want_z:
        return loss, log_p, None
    d = log_p.exp_()
    d.diagonal(dim1=1, dim2=2).sub_(1)
    d.div_(views * classes)
    diagonal = d.diagonal(dim1=1, dim2=2)
    along = diagonal.T[..., None].clone()
    diagonal.zero_()
    dx = along * positive + (along * x).roll(1, dims=1)
    dx += (2 * L2_WEIGHT / views * (1 / classes + 1 / classes**2)) * x
    return loss, d, dx.reshape(z.shape)


def _synthetic_backward(graph: GraphPass, mixer: TorchMixer, theta: Tensor | None, dlogits: Tensor) -> Tensor:
    """dlogits (K, C, C) → dz through every synthetic negative."""
    schedule, z = graph.schedule, graph.z
    into, into_positive = NodeSum(schedule, z.shape[1], like=z), NodeSum(schedule, 1, like=z)
    square = 2 * L2_WEIGHT / (schedule.views * schedule.classes**2)
    for number, tile in enumerate(schedule.tiles):
        if theta is not None:
            coefficients = graph.rows(theta, tile).to(z.dtype)
        else:
            coefficients = graph.coefficients(graph.edge(graph.layers, number, tile))
        index = mix_index(schedule, tile, z.device)
        mixer.backward_z(tile, coefficients, dlogits[index.place], square, into, into_positive)
    return into.total() + mixer.positive_backward(into_positive.total())


# -- phase 3


class GeneratorResult(NamedTuple):
    """CE before its factor, J_sim, J_div, and the parameters' gradients of J_gen."""

    negative_entropy: Tensor
    dissimilarity: Tensor
    diversity: Tensor
    parameters: dict[str, Tensor]


def generator_pass(
    graph: GraphPass,
    mixer: TorchMixer,
    judge: TorchJudge,
    classes: Tensor,
    classifier: tuple[Tensor, Tensor],
    zeroed: Tensor | None,
    weights: GeneratorWeights,
) -> GeneratorResult:
    """J_gen's parts, through θ alone. zeroed (K, C, C) bool: similarities that do not count; None: those of a = c."""
    schedule, z = graph.schedule, graph.z
    graph.node_statistics(graph.forward())
    spread = _Spread(graph, weights.diversity)
    losses = _NegativeLosses(graph, mixer, judge, classes, classifier, zeroed, weights)
    sums = HeadGradients(graph.dim, z)
    for number, tile in enumerate(schedule.tiles):
        dy = _head_gradient(graph, mixer, losses, spread, tile, graph.edge(graph.layers, number, tile), sums)
        if graph.record and graph.stored:
            graph.rows(graph.gradient_buffer(), tile).copy_(dy)
    schedule.complete(losses.entropy, losses.dissimilarity)
    if graph.record:
        schedule.complete(*sums.parts())
        graph.gradients |= sums.named(graph.head_weights)
        losses.counting = False
        top = _top_gradient(graph, mixer, losses, spread, sums if graph.options.training else None)
        graph.backward(None, graph.layers - 1, top, want_z=False)
    count = schedule.views * schedule.classes**2
    values = (losses.entropy / count, losses.dissimilarity / count, spread.diversity)
    return GeneratorResult(*(value.to(z.dtype) for value in values), graph.gradients)


def _head_gradient(
    graph: GraphPass,
    mixer: TorchMixer,
    losses: _NegativeLosses,
    spread: _Spread,
    tile: Tile,
    e: Edges,
    sums: HeadGradients | None,
) -> Tensor | None:
    """The losses of a tile → dy, the gradient of the edge BatchNorm's output (T, D), where a gradient is recorded."""
    theta = graph.coefficients(e)
    dn = losses.tile(tile, mixer.negatives(tile, theta))
    if dn is None:
        return None
    dtheta = mixer.backward_theta(tile, dn)
    spread.add_gradient(tile, theta, dtheta)
    return graph.head.head_backward(graph.head_weights, e, theta, dtheta, sums)


def _top_gradient(
    graph: GraphPass, mixer: TorchMixer, losses: _NegativeLosses, spread: _Spread, sums: HeadGradients | None
) -> Callable[[Tile, Edges], Tensor]:
    def gradient(tile: Tile, e: Edges) -> Tensor:
        if graph.stored:
            dy = graph.rows(graph.gradient_buffer(), tile).to(e.full.dtype)
        else:
            dy = _head_gradient(graph, mixer, losses, spread, tile, e, None)
        return graph.head.norm_backward(tile, graph.head_weights, e, dy, sums)

    return gradient


class _Spread:
    """J_div and its gradient: row means of θ and Σθ², gathered in a sweep of their own. Sums are of θ - ½, which θ is
    close to."""

    def __init__(self, graph: GraphPass, weight: float) -> None:
        self._head, schedule, z = graph.head, graph.schedule, graph.z
        sums = DiversitySums(schedule, graph.dim, z)
        for number, tile in enumerate(schedule.tiles):
            self._head.add_diversity(tile, graph.coefficients(graph.edge(graph.layers, number, tile)), sums)
        n = schedule.nodes
        mean, square = sums.sum.total() / n, sums.square.total().sum(dtype=torch.float64)
        # Where all rows of θ are alike the difference is rounding, and may be negative; θ's own rounding is the least.
        least = graph.dim * (torch.finfo(z.dtype).eps / 2) ** 2
        deviation = torch.sqrt((square / n**2 - mean.double().square().sum() / n).clamp_min(least))
        self.diversity = 0.01 * (1 - deviation)
        self._mean = Band(schedule, mean + 0.5)
        self._scale = (-0.01 * weight / (n**2 * deviation)).to(z.dtype)

    def add_gradient(self, tile: Tile, theta: Tensor, into: Tensor) -> None:
        """Adds weight · ∂J_div/∂θ_ij = -0.01 weight (θ_ij - m_i) / (n² √(S/n²)), both directions of an edge."""
        self._head.diversity_backward(tile, theta, self._mean, self._scale, into)


class _NegativeLosses:
    """J_soft and J_sim on a tile's negatives, values and gradients together; the classifier's logits exist a few rows
    at a time."""

    def __init__(
        self,
        graph: GraphPass,
        mixer: TorchMixer,
        judge: TorchJudge,
        classes: Tensor,
        classifier: tuple[Tensor, Tensor],
        zeroed: Tensor | None,
        weights: GeneratorWeights,
    ) -> None:
        self._mixer, self._judge, self._classes, self._zeroed = mixer, judge, classes, zeroed
        self._nodes = graph.z.contiguous()
        self._want, self._compute = graph.record, graph.options.compute
        self._weight, self._bias = classifier[0].to(self._compute), classifier[1]
        count = graph.schedule.views * graph.schedule.classes**2
        self._soft, self._similarity = weights.soft / count, weights.similarity / count
        self.entropy = torch.zeros((), dtype=torch.float64, device=graph.z.device)
        self.dissimilarity = torch.zeros_like(self.entropy)
        self.counting = True

    def tile(self, tile: Tile, negatives: Tensor) -> Tensor | None:
        """N (mixes, D) → dN (mixes, D) if a gradient is recorded; the values are added up while counting."""
        index = mix_index(self._mixer.schedule, tile, negatives.device)
        dn = self._entropy(negatives, self._classes[index.negative])
        counted = ~self._zeroed[index.place] if self._zeroed is not None else index.anchor != index.negative
        found = self._judge.similarity(self._nodes, index.node, negatives, counted, self._similarity, dn)
        if self.counting:
            self.dissimilarity += found.sum(dtype=torch.float64)
        return dn

    def _entropy(self, negatives: Tensor, labels: Tensor) -> Tensor | None:
        dn = torch.empty_like(negatives) if self._want else None
        step = max(1, LOGITS_AT_ONCE // self._weight.shape[0])
        for start in range(0, len(negatives), step):
            part, label = negatives[start : start + step].to(self._compute), labels[start : start + step]
            logits = self._judge.logits(part, self._weight)
            found, d = self._judge.cross_entropy(logits, self._bias, label, self._soft, self._want)
            if self.counting:
                self.entropy += found.sum(dtype=torch.float64)
            if dn is not None:
                dn[start : start + step] = torch.mm(d, self._weight)
        return dn


# -- generation


def coefficients(graph: GraphPass) -> Tensor:
    """θ of every ordered pair (n, n, D), in canonical order."""
    schedule = graph.schedule
    graph.forward()
    classes, views = schedule.classes, schedule.views
    out = schedule.room(graph.z, classes, views, classes, views, graph.dim)
    for number, tile in enumerate(schedule.tiles):
        theta = graph.coefficients(graph.edge(graph.layers, number, tile))
        grid = theta.view(*schedule.shape(tile), -1)
        first = torch.arange(tile.first_class, tile.first_class + tile.classes, device=out.device)[:, None]
        columns = schedule.column_classes(tile, out.device)
        # Two index tensors apart put their dimensions first: (A, O, K, K, D).
        out[first, :, columns] = grid.permute(0, 2, 1, 3, 4)
        if tile.mirrored < tile.offsets:
            skip = tile.mirrored
            out[columns[:, skip:], :, first] = grid[:, :, skip:].permute(0, 2, 3, 1, 4)
    schedule.complete(out)
    return out.view(schedule.nodes, schedule.nodes, -1)
