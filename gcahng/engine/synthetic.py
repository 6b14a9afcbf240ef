"""J_syn over tiles of edges, with its gradient (gcahng.reference.synthetic says what it means).

Each function here sweeps over the tiles once for what the loss needs of the negatives, and once for its gradient. No
more than a tile's negatives are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.graph import GraphPass
from gcahng.engine.operands import Settings
from gcahng.engine.schedule import ByTile, NodeSum, Schedule, Tile, totals
from gcahng.engine.stages.mix import Mixing, MixUpstream
from gcahng.engine.stages.mix_index import batch_mixes, by_tile
from gcahng.reference.npair import L2_WEIGHT
from gcahng.reference.synthetic import SMALLEST_NORM

FormSynthetic = Callable[[GraphPass, Mixing, Settings, bool], tuple[Tensor, Tensor | None]]
"""Forms J_syn (0-dim) and, where the last argument says so, its gradient for z (n, D), else None.

Where edges are stored, θ takes the place of those that leave the last layer, since nothing else needs them: they have
no gradient in this phase. Then that memory takes the edges' gradients.
"""


class MixGradients:
    """The gradients of z that come through the mix, summed over a pass's tiles.

    Args:
        graph: the pass, whose context has the memory.
        mixing: how negatives are mixed.
        anchors: whether anchors and their positives have a gradient.
    """

    def __init__(self, graph: GraphPass, mixing: Mixing, anchors: bool) -> None:
        self._graph, self._mixing, self._anchors = graph, mixing, anchors
        self.z: NodeSum
        self.z, self._positive = graph.stages.context.node_sums({"dz": graph.dim, "d positive": 1})

    def add(self, tile: Tile, upstream: MixUpstream) -> None:
        """Adds a tile's part."""
        mix = self._graph.stages.mix
        mix.backward_z(self._mixing, tile, upstream, self.z, self._positive, anchors=self._anchors)

    def total(self) -> Tensor:
        """Over the tiles of all processes (n, D). To be called once, since it adds in place."""
        dz, d_positive = totals(self.z, self._positive)  # memory that the next pass uses again
        return dz + self._mixing.positive_backward(d_positive) if self._anchors else dz.clone()


def npair(graph: GraphPass, mixing: Mixing, s: Settings, want_z: bool) -> tuple[Tensor, Tensor | None]:
    """The paper's J_syn; see FormSynthetic."""
    z, schedule, context = graph.z, graph.schedule, graph.stages.context
    mixes = batch_mixes(context)
    of_mixes, squares, theta = _sweep(graph, mixing)
    norms = (squares * mixes.others).sum(dtype=torch.float64)
    schedule.complete(norms)
    loss, dlogits, dz = _npair(z, schedule, _logits(graph, of_mixes), norms, want_z)
    if want_z:
        gradients = MixGradients(graph, mixing, s.anchor_gradient)
        square = 2 * L2_WEIGHT / (schedule.views * schedule.classes**2)
        d_mixes = by_tile(schedule, dlogits.view(-1)[mixes.place])
        for tile, coefficients in _coefficients(graph, theta):
            gradients.add(tile, MixUpstream(coefficients, d_mixes[tile], square, None))
        dz = dz + gradients.total() if s.anchor_gradient else gradients.total()
    graph.buffer = theta
    return loss, dz


def cosine(graph: GraphPass, mixing: Mixing, s: Settings, want_z: bool) -> tuple[Tensor, Tensor | None]:
    """J_syn in cosines; see FormSynthetic."""
    z, schedule, t = graph.z, graph.schedule, s.temperature
    mixes = batch_mixes(graph.stages.context)
    of_mixes, squares, theta = _sweep(graph, mixing)
    lengths = torch.linalg.vector_norm(z, dim=1).clamp_min(SMALLEST_NORM)
    of_negative, of_anchor = squares.sqrt_().clamp_min_(SMALLEST_NORM), lengths[mixes.node]
    of_mixes = of_mixes / (of_negative * of_anchor * t)
    unit = (z / lengths[:, None]).view(schedule.classes, schedule.views, -1)
    positive = unit.roll(-1, dims=1)
    to_positive = (unit * positive).sum(dim=-1)  # (C, K)
    log_p = _log_softmax(schedule, _logits(graph, of_mixes), to_positive.T / t)
    loss = -log_p.diagonal(dim1=1, dim2=2).mean()
    if not want_z:
        graph.buffer = theta
        return loss, None
    dlogits, along = _cross_entropy_backward(schedule, log_p)
    d = dlogits.view(-1)[mixes.place]
    # Of a·N / (‖a‖ ‖N‖ t): how much of a and of N there is in the gradients of N and of a.
    across, own = d / (of_anchor * of_negative * t), d * of_mixes
    negative_own, anchor_own = -own / of_negative.square(), -own / of_anchor.square()
    parts = [by_tile(schedule, x[:, None]) for x in (across, negative_own, anchor_own)]
    nodes = by_tile(schedule, mixes.node)
    gradients = MixGradients(graph, mixing, s.anchor_gradient)
    for tile, coefficients in _coefficients(graph, theta):
        negatives, anchors = graph.stages.mix.negatives(mixing, tile, coefficients), z[nodes[tile]]
        g, of_own, at_anchor = (x[tile] for x in parts)
        gradients.add(tile, MixUpstream(coefficients, None, 0.0, g * anchors + of_own * negatives))
        if s.anchor_gradient:
            graph.stages.mix.add_at_anchors(mixing, tile, g * negatives + at_anchor * anchors, gradients.z)
    dz = gradients.total()
    if s.anchor_gradient:
        of_pair = (along / t)[..., None]
        d_unit = of_pair * (positive - to_positive[..., None] * unit)
        d_positive = of_pair * (unit - to_positive[..., None] * positive)
        by_node = lengths.view(schedule.classes, schedule.views, 1)
        direct = d_unit / by_node + (d_positive / by_node.roll(-1, dims=1)).roll(1, dims=1)
        dz = dz + direct.reshape(z.shape)
    graph.buffer = theta
    return loss, dz


FORMS: dict[str, FormSynthetic] = {"npair": npair, "cosine": cosine}
"""By pairing."""


def _sweep(graph: GraphPass, mixing: Mixing) -> tuple[Tensor, Tensor, ByTile | None]:
    """a·N and ‖N‖² (mixes,) of this process's mixes, and θ where edges are stored."""
    schedule, mixes = graph.schedule, batch_mixes(graph.stages.context)
    of_mixes, squares = graph.z.new_empty(2, len(mixes.place))
    logits_of, squares_of = by_tile(schedule, of_mixes), by_tile(schedule, squares)
    for tile in schedule.tiles:
        coefficients = graph.last_coefficients(tile)
        graph.stages.mix.logits(mixing, tile, coefficients, logits_of[tile], squares_of[tile])
    theta, graph.s[-1] = graph.s[-1], None
    return of_mixes, squares, theta


def _coefficients(graph: GraphPass, theta: ByTile | None) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with its θ (T, D), which was stored or is computed again."""
    for tile in graph.schedule.tiles:
        if theta is not None:
            yield tile, graph.full(theta[tile])
        else:
            yield tile, graph.coefficients(graph.edge(graph.layers, tile))


def _logits(graph: GraphPass, of_mixes: Tensor) -> Tensor:
    """The logits (K, C, C) of mixes (mixes,). Of several processes each has its own tiles', and −∞ for the others."""
    schedule = graph.schedule
    logits = graph.z.new_empty(schedule.views, schedule.classes, schedule.classes)
    if schedule.ranks is not None:
        logits.fill_(-torch.inf)
    logits.view(-1)[batch_mixes(graph.stages.context).place] = of_mixes
    return logits


def _npair(
    z: Tensor, schedule: Schedule, logits: Tensor, norms: Tensor, want_z: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """J_syn and its gradients, from the logits of the negatives.

    Args:
        z: embeddings (n, D).
        schedule: the tiles.
        logits: a·N (K, C, C), as _logits returns them; they are overwritten.
        norms: Σ‖N‖² over a ≠ c.
        want_z: whether gradients are wanted.

    Returns:
        J_syn; the gradient of the logits of this process, its diagonal zeroed; and the part of dz (n, D) that comes
        from the positives and the anchors' norms. Without want_z the second has no meaning and the third is None.
    """
    views, classes = schedule.views, schedule.classes
    x = z.view(classes, views, -1)
    positive = x.roll(-1, dims=1)
    log_p = _log_softmax(schedule, logits, (x * positive).sum(dim=-1).T)
    own_weight, weight = L2_WEIGHT / views * (1 / classes + 1 / classes**2), L2_WEIGHT / (views * classes**2)
    squares = own_weight * x.square().sum() + weight * norms
    loss = squares.to(z.dtype).sub_(log_p.diagonal(dim1=1, dim2=2).mean())
    if not want_z:
        return loss, log_p, None
    d, along = _cross_entropy_backward(schedule, log_p)
    along = along[..., None]
    dx = (along * x).roll(1, dims=1).addcmul_(along, positive).add_(x, alpha=2 * own_weight)
    return loss, d, dx.view(z.shape)


def _cross_entropy_backward(schedule: Schedule, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the mean of −log p over the diagonal.

    Args:
        schedule: the tiles.
        log_p: (K, C, C), which is overwritten.

    Returns:
        That of the logits (K, C, C), its diagonal zeroed, and that of the positives' logits (C, K).
    """
    d = log_p.exp_()
    diagonal = d.diagonal(dim1=1, dim2=2)
    diagonal.sub_(1)
    d.div_(schedule.views * schedule.classes)
    along = diagonal.T.clone()
    diagonal.zero_()
    return d, along


def _log_softmax(schedule: Schedule, logits: Tensor, positives: Tensor) -> Tensor:
    """The logarithm of the softmax over the last dimension of all processes' logits.

    Processes exchange the rows' maxima and sums alone, since the logits grow with n².

    Args:
        schedule: the tiles.
        logits: a·N (K, C, C), −∞ where they are another process's; they are overwritten.
        positives: logits (K, C) of the diagonal, the same in all processes.

    Returns:
        (K, C, C), of this process's logits and of the diagonal.
    """
    diagonal = logits.diagonal(dim1=1, dim2=2)
    if schedule.ranks is None:
        diagonal.copy_(positives)
        return F.log_softmax(logits, dim=2)
    diagonal.fill_(-torch.inf)
    most = torch.maximum(logits.amax(dim=2), positives)
    schedule.ranks.take_largest(most)
    total = (logits - most[..., None]).exp_().sum(dim=2)
    schedule.complete(total)
    total.add_((positives - most).exp_())
    diagonal.copy_(positives)
    return logits.sub_((most + total.log_())[..., None])
