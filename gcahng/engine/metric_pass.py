"""Phase 1 of a training step: J_syn with θ held fixed, and J_gce, as one operator.

The losses and their gradients are formed together, one tile at a time. So the operator's forward runs the whole pass,
its backward scales the gradients by the upstream ones, and nothing of the batch's edges outlives the forward. Autograd
and torch.compile see a single node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.differentiable_once import differentiable_once
from gcahng.engine.graph import GraphPass
from gcahng.engine.operands import MetricOutputs, PassInputs, Settings, Wanted, metric_outputs
from gcahng.engine.prepare import prepare, replayable
from gcahng.engine.schedule import NodeSum, Schedule
from gcahng.engine.schema import define_operator, differentiate_operator
from gcahng.engine.stages.mix import Mixing, MixUpstream, mix_index
from gcahng.engine.weights import metric_names, parameter_names
from gcahng.engine.workspace import Workspace
from gcahng.reference.npair import L2_WEIGHT


@replayable
def metric_pass(inputs: PassInputs, s: Settings, wanted: Wanted, workspace: Workspace) -> MetricOutputs:
    """Forms the losses of phase 1, and the gradients that are wanted.

    Args:
        inputs: the pass's tensors.
        s: everything else.
        wanted: which gradients are wanted.
        workspace: memory for the stages.
    """
    graph, mixing, statistics = prepare(inputs, s, workspace, record=any(wanted), update=s.training)
    schedule, z = graph.schedule, graph.z
    f = graph.forward()
    logits, norms = _synthetic_logits(graph, mixing)
    theta, graph.s[-1] = graph.s[-1], None
    synthetic, dlogits, dz_synthetic = _synthetic_npair(z, schedule, logits, norms, wanted.want_z)
    if wanted.want_z:
        dz_synthetic += _synthetic_backward(graph, mixing, theta, dlogits)
    graph.buffer = theta  # θ is no longer needed: its memory takes the edges' gradients

    segment = graph.node_head(f)
    labels = inputs.classes.repeat_interleave(schedule.views)
    log_p = F.log_softmax(segment.outputs[0].detach().to(z.dtype), dim=1)
    entropy = F.nll_loss(log_p, labels)
    dz_entropy = None
    if graph.record:
        d = log_p.exp_()
        d[torch.arange(len(labels), device=d.device), labels] -= 1
        (df,) = segment.backward([d.div_(len(labels))], graph.gradients)
        dz_entropy = graph.backward(df, graph.layers - 2, None, wanted.want_z)
    gradients = []
    if wanted.want_parameters:  # contiguous, as the fake says, whatever the weights are
        gradients = [graph.gradients[name].contiguous() for name in metric_names(s.layers)]
    dz = (z.new_empty(0) if d is None else d for d in (dz_synthetic, dz_entropy))
    return MetricOutputs(synthetic, entropy, statistics, *dz, gradients)


# -- J_syn


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


# -- as an operator


def _fake(inputs: PassInputs, s: Settings, wanted: Wanted) -> list[Tensor]:
    z = inputs.z
    gradients = []
    if wanted.want_parameters:
        named = dict(zip(parameter_names(s.layers), inputs.parameters, strict=True))
        gradients = [named[name].new_empty(named[name].shape) for name in metric_names(s.layers)]
    statistics = [torch.empty_like(b) for b in (*inputs.buffers[:3], *inputs.buffers[4:7])]
    dz = [torch.empty_like(z) if wanted.want_z else z.new_empty(0) for _ in range(2)]
    return MetricOutputs(z.new_empty(()), z.new_empty(()), statistics, *dz, gradients).flat()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)  # which would be zeros, as large as all that this operator returns
    pass_inputs, s, ctx.wanted = METRIC_PASS.values(inputs)
    ctx.layers, ctx.buffers = s.layers, len(pass_inputs.buffers)
    outputs = metric_outputs(output)
    ctx.save_for_backward(outputs.dz_synthetic, outputs.dz_entropy, *outputs.gradients)


def _backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    zero, d_outputs = ctx.saved_tensors[0].new_zeros(()), metric_outputs(upstream)
    d_synthetic, d_entropy = (zero if d is None else d for d in (d_outputs.synthetic, d_outputs.entropy))
    dz_synthetic, dz_entropy, *scaled = differentiable_once(
        "the engine", _scale, *ctx.saved_tensors, d_synthetic, d_entropy
    )
    named = dict(zip(metric_names(ctx.layers), scaled, strict=True)) if ctx.wanted.want_parameters else {}
    gradients = PassInputs(
        z=dz_synthetic + dz_entropy if ctx.wanted.want_z else None,
        classes=None,
        pull=None,
        u=None,
        draw=None,
        parameters=[named.get(name) for name in parameter_names(ctx.layers)],
        buffers=[None] * ctx.buffers,
    )
    return *gradients, *[None] * (len(Settings._fields) + len(Wanted._fields))


def _scale(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Multiplies the gradients of J_syn and of J_gce with the upstream gradients of the two losses, which come last."""
    dz_synthetic, dz_entropy, *parameters, d_synthetic, d_entropy = tensors
    return dz_synthetic * d_synthetic, dz_entropy * d_entropy, *(g * d_entropy for g in parameters)


METRIC_PASS = define_operator("metric_pass", (PassInputs, Settings, Wanted), "Tensor[]", metric_pass, _fake)
differentiate_operator("metric_pass", _backward, _setup)


def run_metric_pass(inputs: PassInputs, s: Settings, wanted: Wanted) -> MetricOutputs:
    """Calls the operator; arguments as of metric_pass."""
    return metric_outputs(torch.ops.gcahng.metric_pass(*inputs, *s, *wanted))
