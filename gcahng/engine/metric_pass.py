"""Phase 1 of a training step: J_syn with θ held fixed, and J_gce, over tiles. Losses and their gradients are formed
together."""

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
    """J_syn (not yet weighted) and J_gce, and the gradients that were asked for: of J_syn for z, of J_gce for z and for
    the parameters."""

    synthetic: Tensor
    node_entropy: Tensor
    dz_synthetic: Tensor | None
    dz_entropy: Tensor | None
    parameters: dict[str, Tensor]


def metric_pass(graph: GraphPass, mixing: Mixing, classes: Tensor, want_z: bool) -> MetricResult:
    """J_syn with θ held fixed, and J_gce. classes (C,)."""
    schedule, z = graph.schedule, graph.z
    f = graph.forward()
    logits, norms = _synthetic_logits(graph, mixing)
    theta, graph.s[-1] = graph.s[-1], None
    synthetic, dlogits, dz_synthetic = _synthetic_npair(z, schedule, logits, norms, want_z)
    if want_z:
        dz_synthetic += _synthetic_backward(graph, mixing, theta, dlogits)
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


def _synthetic_logits(graph: GraphPass, mixing: Mixing) -> tuple[Tensor, Tensor]:
    """Logits a·N (K, C, C) and Σ‖N‖² over a ≠ c. Where edges are stored, θ takes the place of the last ones, which
    nothing else needs: here they get no gradient."""
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


def _synthetic_backward(graph: GraphPass, mixing: Mixing, theta: Tensor | None, dlogits: Tensor) -> Tensor:
    """dlogits (K, C, C) → dz through every synthetic negative."""
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
