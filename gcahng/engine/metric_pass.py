"""Phase 1 of a training step: J_syn with θ held fixed, and J_gce.

The losses and their gradients are formed together, one tile at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.graph import GraphPass
from gcahng.engine.schedule import NodeSum, Schedule
from gcahng.engine.stages.mix import Mixing, MixUpstream, mix_index
from gcahng.reference.npair import L2_WEIGHT


class MetricResult(NamedTuple):
    """What the phase returns.

    Attributes:
        synthetic: J_syn, not yet weighted, 0-dim.
        node_entropy: J_gce, 0-dim.
        dz_synthetic: gradient of J_syn for z (n, D), or None if it is not wanted.
        dz_entropy: gradient of J_gce for z (n, D), or None if it is not wanted.
        parameters: gradients of J_gce, by the parameters' names; empty if the pass records none.
    """

    synthetic: Tensor
    node_entropy: Tensor
    dz_synthetic: Tensor | None
    dz_entropy: Tensor | None
    parameters: dict[str, Tensor]


def metric_pass(graph: GraphPass, mixing: Mixing, classes: Tensor, want_z: bool) -> MetricResult:
    """Forms the losses of phase 1, and the gradients that the pass records.

    Args:
        graph: a pass that has not run yet.
        mixing: how the batch's negatives are mixed.
        classes: labels (C,) of the batch's classes.
        want_z: whether the gradients for z are wanted.
    """
    schedule, z = graph.schedule, graph.z
    f = graph.forward()
    logits, norms = _synthetic_logits(graph, mixing)
    theta, graph.s[-1] = graph.s[-1], None
    synthetic, dlogits, dz_synthetic = _synthetic_npair(z, schedule, logits, norms, want_z)
    if want_z:
        dz_synthetic += _synthetic_backward(graph, mixing, theta, dlogits)
    graph.buffer = theta  # θ is no longer needed: its memory takes the edges' gradients

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


def _synthetic_logits(graph: GraphPass, mixing: Mixing) -> tuple[Tensor, Tensor]:
    """Logits a·N (K, C, C), and Σ‖N‖² over a ≠ c.

    Where edges are stored, θ takes the place of those that leave the last layer. Nothing else needs them, since they
    have no gradient in this phase.
    """
    schedule = graph.schedule
    logits = schedule.room(graph.z, schedule.views, schedule.classes, schedule.classes)
    norms = torch.zeros((), dtype=torch.float64, device=graph.z.device)
    for tile in schedule.tiles:
        coefficients = graph.coefficients(graph.edge(graph.layers, tile))
        if graph.stored:
            graph.rows(graph.s[-1], tile).copy_(coefficients)
        index = mix_index(schedule, tile, logits.device)
        logits[index.place], squares = graph.stages.mix.logits(mixing, tile, coefficients)
        norms += (squares * (index.anchor != index.negative)).sum()
    schedule.complete(logits, norms)
    return logits, norms


def _synthetic_npair(
    z: Tensor, schedule: Schedule, logits: Tensor, norms: Tensor, want_z: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """J_syn and its gradients, from the logits of the negatives.

    Args:
        z: embeddings (n, D).
        schedule: the tiles.
        logits: a·N (K, C, C), whose diagonal is overwritten by the positives' logits.
        norms: Σ‖N‖² over a ≠ c.
        want_z: whether gradients are wanted.

    Returns:
        J_syn; the gradient of the logits, its diagonal zeroed; and the part of dz (n, D) that comes from the positives
        and the anchors' norms. Without want_z the second has no meaning and the third is None.
    """
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


def _synthetic_backward(graph: GraphPass, mixing: Mixing, theta: Tensor | None, dlogits: Tensor) -> Tensor:
    """The part of dz (n, D) that comes through the synthetic negatives, from dlogits (K, C, C)."""
    schedule, z = graph.schedule, graph.z
    into, into_positive = NodeSum(schedule, z.shape[1], like=z), NodeSum(schedule, 1, like=z)
    square = 2 * L2_WEIGHT / (schedule.views * schedule.classes**2)
    for tile in schedule.tiles:
        if theta is not None:
            coefficients = graph.rows(theta, tile).to(z.dtype)
        else:
            coefficients = graph.coefficients(graph.edge(graph.layers, tile))
        index = mix_index(schedule, tile, z.device)
        upstream = MixUpstream(coefficients, dlogits[index.place], square, None)
        graph.stages.mix.backward_z(mixing, tile, upstream, into, into_positive)
    return into.total() + mixing.positive_backward(into_positive.total())
