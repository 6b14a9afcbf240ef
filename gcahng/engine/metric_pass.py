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
from gcahng.engine.operands import MetricOutputs, PassInputs, Settings, Wanted, metric_outputs
from gcahng.engine.prepare import prepare, replayable
from gcahng.engine.schema import define_operator, differentiate_operator
from gcahng.engine.synthetic import FORMS, FormSynthetic
from gcahng.engine.weights import metric_names, parameter_names
from gcahng.engine.workspace import Workspace

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
    return form_losses(inputs, s, wanted, workspace, FORMS[s.pairing])


def form_losses(
    inputs: PassInputs, s: Settings, wanted: Wanted, workspace: Workspace, form: FormSynthetic
) -> MetricOutputs:
    """What metric_pass does, with any function that forms J_syn."""
    graph, mixing, statistics = prepare(inputs, s, workspace, record=any(wanted), update=s.training)
    schedule, z = graph.schedule, graph.z
    f = graph.forward()
    synthetic, dz_synthetic = form(graph, mixing, s, wanted.want_z)

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
