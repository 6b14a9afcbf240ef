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
from gcahng.engine.schedule import ByTile, Schedule, totals
from gcahng.engine.schema import define_operator, differentiate_operator
from gcahng.engine.stages.mix import Mixing, MixUpstream
from gcahng.engine.stages.mix_index import batch_mixes, by_tile
from gcahng.engine.weights import metric_names, parameter_names
from gcahng.engine.workspace import Workspace
from gcahng.reference.npair import L2_WEIGHT

MEAN = 1  # the reduction of a loss, as torch's operators number it


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
    theta, graph.s[-1] = graph.s[-1], None  # where edges are stored
    synthetic, dlogits, dz_synthetic = _synthetic_npair(z, schedule, logits, norms, wanted.want_z)
    if wanted.want_z:
        dz_synthetic += _synthetic_backward(graph, mixing, theta, dlogits)
    graph.buffer = theta  # θ is no longer needed: its memory takes the edges' gradients

    head = graph.node_head(f)
    labels = inputs.classes.repeat_interleave(schedule.views)
    log_p = F.log_softmax(head.logits, dim=1, dtype=z.dtype)
    entropy, weight = torch.ops.aten.nll_loss_forward(log_p, labels, None, MEAN, -100)
    dz_entropy = None
    if graph.record:
        d = torch.ops.aten.nll_loss_backward(torch.ones_like(entropy), log_p, labels, None, MEAN, -100, weight)
        d = torch.ops.aten._log_softmax_backward_data(d, log_p, 1, z.dtype)
        dz_entropy = graph.backward(head.backward(d, graph.gradients), graph.layers - 2, None, wanted.want_z)
    gradients = []
    if wanted.want_parameters:  # contiguous, as the fake says, whatever the weights are
        gradients = [graph.gradients[name].contiguous() for name in metric_names(s.layers)]
    dz = (z.new_empty(0) if d is None else d for d in (dz_synthetic, dz_entropy))
    return MetricOutputs(synthetic, entropy, statistics, *dz, gradients)


# -- J_syn


def _synthetic_logits(graph: GraphPass, mixing: Mixing) -> tuple[Tensor, Tensor]:
    """Logits a·N (K, C, C), and Σ‖N‖² over a ≠ c.

    Of several processes each has the logits of its own tiles, and −∞ for the others. Where edges are stored, θ takes
    the place of those that leave the last layer. Nothing else needs them, since they have no gradient in this phase.
    """
    schedule, mixes = graph.schedule, batch_mixes(graph.stages.context)
    of_mixes, squares = graph.z.new_empty(2, len(mixes.place))
    logits_of, squares_of = by_tile(schedule, of_mixes), by_tile(schedule, squares)
    for tile in schedule.tiles:
        coefficients = graph.last_coefficients(tile)
        graph.stages.mix.logits(mixing, tile, coefficients, logits_of[tile], squares_of[tile])
    logits = graph.z.new_empty(schedule.views, schedule.classes, schedule.classes)
    if schedule.ranks is not None:
        logits.fill_(-torch.inf)
    logits.view(-1)[mixes.place] = of_mixes
    norms = (squares * mixes.others).sum(dtype=torch.float64)
    schedule.complete(norms)
    return logits, norms


def _synthetic_npair(
    z: Tensor, schedule: Schedule, logits: Tensor, norms: Tensor, want_z: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """J_syn and its gradients, from the logits of the negatives.

    Args:
        z: embeddings (n, D).
        schedule: the tiles.
        logits: a·N (K, C, C), as _synthetic_logits returns them; they are overwritten.
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
    diagonal = log_p.diagonal(dim1=1, dim2=2)
    own_weight, weight = L2_WEIGHT / views * (1 / classes + 1 / classes**2), L2_WEIGHT / (views * classes**2)
    squares = own_weight * x.square().sum() + weight * norms
    loss = squares.to(z.dtype).sub_(diagonal.mean())
    if not want_z:
        return loss, log_p, None
    d = log_p.exp_()
    diagonal.sub_(1)
    d.div_(views * classes)
    along = diagonal.T[..., None].clone()
    diagonal.zero_()
    dx = (along * x).roll(1, dims=1).addcmul_(along, positive).add_(x, alpha=2 * own_weight)
    return loss, d, dx.view(z.shape)


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


def _synthetic_backward(graph: GraphPass, mixing: Mixing, theta: ByTile | None, dlogits: Tensor) -> Tensor:
    """The part of dz (n, D) that comes through the synthetic negatives, from dlogits (K, C, C)."""
    schedule, context = graph.schedule, graph.stages.context
    into, into_positive = context.node_sums({"dz": graph.dim, "d positive": 1})
    square = 2 * L2_WEIGHT / (schedule.views * schedule.classes**2)
    of_mixes = by_tile(schedule, dlogits.view(-1)[batch_mixes(context).place])
    for tile in schedule.tiles:
        if theta is not None:
            coefficients = graph.full(theta[tile])
        else:
            coefficients = graph.coefficients(graph.edge(graph.layers, tile))
        upstream = MixUpstream(coefficients, of_mixes[tile], square, None)
        graph.stages.mix.backward_z(mixing, tile, upstream, into, into_positive)
    dz, d_positive = totals(into, into_positive)
    return dz + mixing.positive_backward(d_positive)


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
    saved = ctx.saved_tensors  # unpacked once: hooks may copy them each time
    zero, d_outputs = saved[0].new_zeros(()), metric_outputs(upstream)
    d_synthetic, d_entropy = (zero if d is None else d for d in (d_outputs.synthetic, d_outputs.entropy))
    dz_synthetic, dz_entropy, *scaled = differentiable_once("the engine", _scale, *saved, d_synthetic, d_entropy)
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
    scaled = torch._foreach_mul(parameters, d_entropy) if parameters else ()
    return dz_synthetic * d_synthetic, dz_entropy * d_entropy, *scaled


METRIC_PASS = define_operator("metric_pass", (PassInputs, Settings, Wanted), "Tensor[]", metric_pass, _fake)
differentiate_operator("metric_pass", _backward, _setup)


def run_metric_pass(inputs: PassInputs, s: Settings, wanted: Wanted) -> MetricOutputs:
    """Calls the operator; arguments as of metric_pass."""
    return metric_outputs(torch.ops.gcahng.metric_pass(*inputs, *s, *wanted))
