"""The two passes of a training step and the generation of negatives, over tiles. Losses and their gradients are formed together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.graph import GraphOptions, GraphPass
from gcahng.engine.head import HeadGradients, TorchHead, weighted_sum
from gcahng.engine.masks import EdgeDropout
from gcahng.engine.mixing import Direction, Mixer, mixing_weights
from gcahng.engine.schedule import Band, NodeSum, Schedule, Tile
from gcahng.engine.stages import TorchStages
from gcahng.reference.losses import L2_WEIGHT
from gcahng.reference.passes import GeneratorWeights

LOGITS_AT_ONCE = 1 << 22


class PassInput(NamedTuple):
    """One batch in canonical order: z (n, D), classes (C,), pull 0-dim, u (K, K-1), parameters and buffers as lists."""

    z: Tensor
    classes: Tensor
    pull: Tensor
    u: Tensor
    named: dict[str, Tensor]
    buffers: list[Tensor]
    dropout: EdgeDropout | None


def _graph(batch: PassInput, schedule: Schedule, stages: TorchStages, options: GraphOptions, record: bool) -> GraphPass:
    return GraphPass(batch.named, batch.buffers, batch.z, schedule, stages, batch.dropout, options, record)


# -- phase 1


class MetricResult(NamedTuple):
    """J_syn (unweighted) and J_gce; gradients of each where asked for: of J_syn for z, of J_gce for z and the parameters."""

    synthetic: Tensor
    node_entropy: Tensor
    dz_synthetic: Tensor | None
    dz_entropy: Tensor | None
    parameters: dict[str, Tensor]


def metric_pass(
    batch: PassInput, schedule: Schedule, stages: TorchStages, options: GraphOptions, want_z: bool, want_parameters: bool
) -> MetricResult:
    """J_syn with θ held fixed, and J_gce."""
    record = want_z or want_parameters
    graph = _graph(batch, schedule, stages, options, record)
    f = graph.forward()
    theta, mixer, logits, norms = _synthetic_logits(graph, batch)
    synthetic, dlogits, dz_synthetic = _synthetic_npair(batch.z, schedule, logits, norms, want_z)
    if want_z:
        dz_synthetic += _synthetic_backward(graph, theta, mixer, dlogits)
    graph.s[-1] = None
    if theta is not None:
        graph.buffer = theta  # θ is done with: its memory takes the edges' gradients

    segment = graph.node_head(f)
    node_logits = segment.outputs[0]
    labels = batch.classes.repeat_interleave(schedule.views)
    log_p = F.log_softmax(node_logits.detach().to(batch.z.dtype), dim=1)
    entropy = F.nll_loss(log_p, labels)
    dz = None
    if record:
        d = log_p.exp_()
        d[torch.arange(len(labels), device=d.device), labels] -= 1
        (df,) = segment.backward([d.div_(len(labels))], graph.gradients)
        dz = graph.backward(df, graph.layers - 2, None, want_z)
    return MetricResult(synthetic, entropy, dz_synthetic, dz, graph.gradients)


def _coefficients(graph: GraphPass, head: TorchHead, weights, number: int, tile: Tile) -> Tensor:  # noqa: ANN001
    return head.head(weights, graph.edge(graph.layers, number, tile))


def _synthetic_logits(graph: GraphPass, batch: PassInput) -> tuple[Tensor | None, Mixer, Tensor, Tensor]:
    """θ of all tiles where edges are stored (in place of the last edges), the mixer, logits a·N (K, C, C) and Σ‖N‖² (over
    a ≠ c)."""
    schedule = graph.schedule
    graph.head = TorchHead(schedule, graph.options.compute)
    graph.weights = graph.head_weights()
    mixer = Mixer(schedule, batch.z, batch.pull, mixing_weights(batch.u))
    logits = batch.z.new_empty(schedule.views, schedule.classes, schedule.classes)
    norms = torch.zeros((), dtype=torch.float64, device=batch.z.device)
    store = graph.s[-1]
    for number, tile in enumerate(schedule.tiles):
        theta = _coefficients(graph, graph.head, graph.weights, number, tile)
        if store is not None:
            graph._rows(store, tile).copy_(theta)
        for d in mixer.directions(tile, theta):
            negatives = mixer.mix(d).negatives
            logits[d.index] = (negatives * d.anchors[:, :, :, 0]).sum(dim=-1)
            square = negatives.square().sum(dim=-1)
            norms += (square[:, :, 1:] if d.own else square).sum()
    return store, mixer, logits, norms


def _synthetic_npair(
    z: Tensor, schedule: Schedule, logits: Tensor, norms: Tensor, want_z: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """J_syn, d of the logits (diagonal zeroed), and dz of what is no synthetic negative: positives and the anchors' norms."""
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


def _synthetic_backward(graph: GraphPass, theta: Tensor | None, mixer: Mixer, dlogits: Tensor) -> Tensor:
    """dlogits (K, C, C) → dz through every synthetic negative."""
    schedule, z = graph.schedule, graph.z
    into, into_positive = NodeSum(schedule, z.shape[1], like=z), NodeSum(schedule, 1, like=z)
    norm = 2 * L2_WEIGHT / (schedule.views * schedule.classes**2)
    for number, tile in enumerate(schedule.tiles):
        if theta is not None:
            coefficients = graph._rows(theta, tile).to(z.dtype)
        else:
            coefficients = _coefficients(graph, graph.head, graph.weights, number, tile)
        for d in mixer.directions(tile, coefficients):
            m = mixer.mix(d)
            g = dlogits[d.index][..., None]
            anchors = d.anchors[:, :, :, 0]
            dn = torch.addcmul(norm * m.negatives, g, anchors)
            direct = g * m.negatives
            if d.own:
                dn[:, :, 0] = 0
            mixer.backward_to_embeddings(tile, d, m, dn, into, into_positive)
            if d.forward:
                into.add_rows(tile, direct.sum(dim=2))
            else:
                into.add_columns(tile, direct.transpose(1, 2), skip=d.skip)
    return into.total() + mixer.positive_backward(into_positive.total())


# -- phase 3


class GeneratorResult(NamedTuple):
    """CE before its factor, J_sim, J_div, and the parameters' gradients of J_gen."""

    negative_entropy: Tensor
    dissimilarity: Tensor
    diversity: Tensor
    parameters: dict[str, Tensor]


def generator_pass(
    batch: PassInput,
    schedule: Schedule,
    stages: TorchStages,
    options: GraphOptions,
    classifier: tuple[Tensor, Tensor],
    zeroed: Tensor | None,
    weights: GeneratorWeights,
    want_parameters: bool,
) -> GeneratorResult:
    """J_gen's parts, through θ alone. zeroed (K, C, C) bool: similarities that do not count; None: those of a = c."""
    graph = _graph(batch, schedule, stages, options, want_parameters)
    graph.node_statistics(graph.forward())
    graph.head = TorchHead(schedule, options.compute)
    graph.weights = graph.head_weights()
    mixer = Mixer(schedule, batch.z, batch.pull, mixing_weights(batch.u))
    spread = _Spread(graph)
    losses = _NegativeLosses(graph, mixer, batch, classifier, zeroed, weights)
    stored = options.edge_memory != "recompute"
    sums = HeadGradients(graph.dim, batch.z)
    for number, tile in enumerate(schedule.tiles):
        e = graph.edge(graph.layers, number, tile)
        theta = graph.head.head(graph.weights, e)
        dtheta = losses.tile(tile, theta, want_parameters, count=True)
        if want_parameters:
            spread.add_gradient(tile, theta, dtheta, weights.diversity)
            dy = graph.head.head_backward(graph.weights, e, theta, dtheta, sums)
            if stored:
                graph._rows(graph.gradient_buffer(), tile).copy_(dy)
    if want_parameters:

        def top_gradient(number: int, tile: Tile, e: Tensor) -> Tensor:
            if stored:
                dy = graph._rows(graph.gradient_buffer(), tile).to(e.dtype)
            else:
                theta = graph.head.head(graph.weights, e)
                dtheta = losses.tile(tile, theta, True, count=False)
                spread.add_gradient(tile, theta, dtheta, weights.diversity)
                dy = graph.head.head_backward(graph.weights, e, theta, dtheta, None)
            return graph.head.norm_backward(tile, graph.weights, e, dy, sums if options.training else None)

        graph.gradients |= sums.named(graph.weights)
        graph.backward(None, graph.layers - 1, top_gradient, want_z=False)
    count = schedule.views * schedule.classes**2
    return GeneratorResult(
        (losses.entropy / count).to(batch.z.dtype),
        (losses.dissimilarity / count).to(batch.z.dtype),
        spread.diversity().to(batch.z.dtype),
        graph.gradients,
    )


class _Spread:
    """J_div and its gradient: row means of θ and Σθ², gathered in a sweep of their own. Sums are of θ - ½, which θ is close to."""

    def __init__(self, graph: GraphPass) -> None:
        self.graph = graph
        schedule, z = graph.schedule, graph.z
        sums = NodeSum(schedule, graph.dim, like=z)
        square = torch.zeros((), dtype=torch.float64, device=z.device)
        for number, tile in enumerate(schedule.tiles):
            theta = _coefficients(graph, graph.head, graph.weights, number, tile).sub_(0.5)
            grid = theta.view(*schedule.shape(tile), -1)
            sums.add_rows(tile, grid.sum(dim=(2, 3)))
            if tile.mirrored < tile.offsets:
                sums.add_columns(tile, grid[:, :, tile.mirrored :].sum(dim=1), skip=tile.mirrored)
            square += weighted_sum(schedule, tile, theta.square()).sum()
        n = schedule.nodes
        mean = sums.total() / n
        self.variance = square / n**2 - mean.double().square().sum() / n
        self.mean = mean + 0.5
        self.band = None

    def diversity(self) -> Tensor:
        return 0.01 * (1 - torch.sqrt(self.variance))

    def add_gradient(self, tile: Tile, theta: Tensor, into: Tensor, weight: float) -> None:
        """Adds weight · ∂J_div/∂θ_ij = -0.01 (θ_ij - m_i) / (n² √S/n), both directions of an edge."""
        schedule = self.graph.schedule
        if self.band is None:
            self.band = Band(schedule, self.mean)
            self.scale = (-0.01 / schedule.nodes**2 / torch.sqrt(self.variance)).to(theta.dtype)
        shape = (*schedule.shape(tile), theta.shape[-1])
        grid, out = theta.view(shape), into.view(shape)
        scale = self.scale * weight
        out += (grid - self.band.rows(tile)[:, :, None, None]) * scale
        if tile.mirrored < tile.offsets:
            skip = tile.mirrored
            out[:, :, skip:] += (grid[:, :, skip:] - self.band.columns(tile)[:, None, skip:]) * scale


class _NegativeLosses:
    """J_soft and J_sim on a tile's negatives, values and gradients together; the classifier's logits exist a few rows at a time."""

    def __init__(
        self,
        graph: GraphPass,
        mixer: Mixer,
        batch: PassInput,
        classifier: tuple[Tensor, Tensor],
        zeroed: Tensor | None,
        weights: GeneratorWeights,
    ) -> None:
        self.mixer, self.classes, self.zeroed = mixer, batch.classes, zeroed
        self.compute = graph.options.compute
        self.weight, self.bias = classifier[0].to(self.compute), classifier[1]
        count = graph.schedule.views * graph.schedule.classes**2
        self.soft, self.similarity = weights.soft / count, weights.similarity / count
        self.entropy = torch.zeros((), dtype=torch.float64, device=batch.z.device)
        self.dissimilarity = torch.zeros_like(self.entropy)

    def tile(self, tile: Tile, theta: Tensor, want: bool, count: bool) -> Tensor | None:
        """θ (T, D) → dθ (T, D) if wanted; the values are added up if they count."""
        dtheta = torch.zeros_like(theta) if want else None
        for d in self.mixer.directions(tile, theta):
            m = self.mixer.mix(d)
            dn = self._entropy(d, m.negatives, want, count)
            self._similarity(d, m.negatives, dn, count)
            if want:
                self.mixer.merge(tile, d, self.mixer.backward_to_theta(m, dn), dtheta)
        return dtheta

    def _entropy(self, d: Direction, negatives: Tensor, want: bool, count: bool) -> Tensor | None:
        rows = negatives.reshape(-1, negatives.shape[-1])
        labels = self.classes[d.classes].expand(negatives.shape[:-1]).reshape(-1)
        dn = torch.empty_like(rows) if want else None
        step = max(1, LOGITS_AT_ONCE // self.weight.shape[0])
        for start in range(0, len(rows), step):
            part, label = rows[start : start + step], labels[start : start + step]
            logits = torch.mm(part.to(self.compute), self.weight.T).to(rows.dtype).add_(self.bias)
            log_p = F.log_softmax(logits, dim=1)
            if count:
                self.entropy += F.nll_loss(log_p, label, reduction="sum")
            if want:
                p = log_p.exp_()
                p[torch.arange(len(part), device=p.device), label] -= 1
                dn[start : start + step] = torch.mm(p.mul_(self.soft).to(self.compute), self.weight)
        return None if dn is None else dn.view_as(negatives)

    def _similarity(self, d: Direction, negatives: Tensor, dn: Tensor | None, count: bool) -> None:
        """Adds the gradient of 1 - cos(a, N) to dn."""
        anchors = d.anchors[:, :, :, 0]
        floor = 1e-8
        norm_a = anchors.norm(dim=-1, keepdim=True).clamp_min(floor)
        norm_n = negatives.norm(dim=-1, keepdim=True).clamp_min(floor)
        cosine = (anchors * negatives).sum(dim=-1, keepdim=True) / (norm_a * norm_n)
        counted = torch.ones_like(cosine)
        if self.zeroed is not None:
            counted = (~self.zeroed[d.index])[..., None].to(cosine.dtype)
        elif d.own:
            counted[:, :, 0] = 0
        if count:
            self.dissimilarity += ((1 - cosine) * counted).sum()
        if dn is not None:
            scale = counted * (self.similarity / norm_n)
            dn.addcmul_(scale / norm_a, anchors, value=-1).addcmul_(scale * cosine / norm_n, negatives)


# -- generation


def coefficients(batch: PassInput, schedule: Schedule, stages: TorchStages, options: GraphOptions) -> Tensor:
    """θ of every ordered pair (n, n, D), without touching any state."""
    graph = _graph(batch, schedule, stages, options, record=False)
    graph.forward()
    head, weights = TorchHead(schedule, options.compute), graph.head_weights()
    classes, views = schedule.classes, schedule.views
    out = batch.z.new_empty(classes, views, classes, views, graph.dim)
    for number, tile in enumerate(schedule.tiles):
        grid = _coefficients(graph, head, weights, number, tile).view(*schedule.shape(tile), -1)
        first = torch.arange(tile.first_class, tile.first_class + tile.classes, device=out.device)[:, None]
        columns = schedule.column_classes(tile, out.device)
        # Two index tensors apart put their dimensions first: (A, O, K, K, D).
        out[first, :, columns] = grid.permute(0, 2, 1, 3, 4)
        if tile.mirrored < tile.offsets:
            skip = tile.mirrored
            out[columns[:, skip:], :, first] = grid[:, :, skip:].permute(0, 2, 3, 1, 4)
    return out.view(schedule.nodes, schedule.nodes, -1)

