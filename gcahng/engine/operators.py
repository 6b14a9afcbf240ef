"""The two passes of a training step as operators that autograd and torch.compile know.

A pass forms its losses and their gradients together, so that each is one operator: its forward runs the pass, and its
backward scales the gradients by the upstream one. Nothing of the batch's edges outlives the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcahng.engine import cuda_graph
from gcahng.engine.differentiable_once import differentiable_once
from gcahng.engine.free_memory import free_memory
from gcahng.engine.generator_pass import GeneratorTargets, generator_pass
from gcahng.engine.graph import GraphOptions, GraphPass
from gcahng.engine.masks import EdgeDropout
from gcahng.engine.metric_pass import metric_pass
from gcahng.engine.operands import (
    GeneratorOutputs,
    MetricOutputs,
    PassInputs,
    Settings,
    Wanted,
    generator_outputs,
    metric_outputs,
)
from gcahng.engine.plan import MODES, StepSize, choose_memory
from gcahng.engine.precision import DTYPES
from gcahng.engine.ranks import ranks_of
from gcahng.engine.schedule import default_tile_rows, make_schedule
from gcahng.engine.schema import define_operator, differentiate_operator, unflatten
from gcahng.engine.stages import make_stages, ops_of
from gcahng.engine.stages.common import StageContext
from gcahng.engine.stages.mix import Mixing, mixing_of
from gcahng.engine.weights import generator_names, metric_names, parameter_names
from gcahng.engine.workspace import Workspace, WorkspaceOfThread

_workspace = WorkspaceOfThread()


# -- one pass


class _Pass(NamedTuple):
    """A pass that is ready to run.

    Attributes:
        graph: the graph network.
        mixing: how negatives are mixed.
        statistics: running mean, variance and count of the edge BatchNorm, then of the node BatchNorm. The pass changes
            them in place.
    """

    graph: GraphPass
    mixing: Mixing
    statistics: list[Tensor]


def _prepare(inputs: PassInputs, s: Settings, workspace: Workspace, record: bool, update: bool) -> _Pass:
    """Prepares a pass.

    Args:
        inputs: the pass's tensors.
        s: everything else.
        workspace: memory for the stages.
        record: whether a backward will follow.
        update: whether the running statistics follow those of the batch.
    """
    z, compute = inputs.z.detach(), DTYPES[s.compute]
    # Triton's kernels take weights by their shape alone.
    named = dict(zip(parameter_names(s.layers), (p.detach().contiguous() for p in inputs.parameters), strict=True))
    memory = edge_memory(z, named["class_head.weight"].shape[0], s)
    rows = default_tile_rows(z.shape[1], compute, memory, z.device.type)
    sizes = (z.shape[0] // s.views, s.views)
    schedule = make_schedule(*sizes, symmetric=s.symmetric, tile_rows=rows, ranks=ranks_of(s.ranks))
    dropout = EdgeDropout(s.p, s.seed, inputs.draw) if s.training and s.p > 0 else None
    ops = ops_of(s.implementation)
    stages = make_stages(StageContext(schedule, z.shape[1], compute, z, dropout, s.layers, workspace, ops))
    # The operator is functional: running statistics are copied here and copied back by its caller.
    copies = [b.clone() for b in inputs.buffers]
    options = GraphOptions(s.heads, compute, s.training, update, s.momentum, s.eps, memory, DTYPES[s.edge_dtype])
    graph = GraphPass(named, copies, z, stages, options, record)
    mixing = mixing_of(schedule, z, inputs.u, inputs.pull)
    return _Pass(graph, mixing, [*copies[:3], *copies[4:7]])


def workspace_for(device: torch.device) -> Workspace:
    """The workspace of a pass: this thread's, or a new one while the caller captures a CUDA graph.

    Such a graph owns the memory that it was captured with, so that no other pass may use it.
    """
    if cuda_graph.capturing():
        return Workspace()
    _workspace.follow(device)
    return _workspace


def edge_memory(z: Tensor, num_classes: int, s: Settings) -> str:
    """Which edges a pass saves, as decided from the free memory where the setting is "auto".

    Args:
        z: embeddings (n, D).
        num_classes: training classes M.
        s: the pass's settings.

    Returns:
        store, hidden or recompute; the same in all processes that share the batch.
    """
    if s.edge_memory != "auto":
        return s.edge_memory
    ranks = ranks_of(s.ranks)
    count = 1 if ranks is None else ranks.count
    sizes = (*z.shape, s.layers, s.views, num_classes)
    dtypes = (DTYPES[s.compute], z.dtype, DTYPES[s.edge_dtype])
    size = StepSize(*sizes, *dtypes, s.symmetric, s.implementation, z.device.type, count)
    if ranks is None:
        return choose_memory(size, free_memory(z.device))

    def own_mode() -> int:
        free = free_memory(z.device)
        if free is not None and z.device.type == "cpu":
            free //= count  # they may all be on this machine
        return MODES.index(choose_memory(size, free))

    return MODES[ranks.agree(size, own_mode, z.device)]


def graph_pass(inputs: PassInputs, s: Settings) -> GraphPass:
    """Prepares the graph network for a batch, without gradients and without changing any state."""
    workspace = workspace_for(inputs.z.device)
    with torch.autocast(inputs.z.device.type, enabled=False):
        return _prepare(inputs, s, workspace, record=False, update=False).graph


Run = Callable[[PassInputs, Settings, Sequence[Tensor], Workspace], list[Tensor]]


def _is_captured(s: Settings) -> bool:
    """Whether a pass is to be replayed from a CUDA graph; not where the caller is capturing a whole step."""
    return bool(s.graphs) and not cuda_graph.capturing()


def _replay(inputs: PassInputs, extra: Sequence[Tensor], s: Settings, kind: tuple[Any, ...], run: Run) -> list[Tensor]:
    """Runs a pass as a CUDA graph, which is captured the first time.

    Args:
        inputs: the pass's tensors.
        extra: tensors beside the inputs, which may lie elsewhere each time.
        s: the pass's settings.
        kind: what tells this pass from others of the same settings.
        run: the pass; called as run(inputs, s, extra, workspace).
    """
    s = s._replace(edge_memory=edge_memory(inputs.z, inputs.parameters[-1].shape[0], s))
    *moving, parameters, buffers = inputs
    count = len(moving)

    def captured(copies: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
        return run(PassInputs(*copies[:count], parameters, buffers), s, copies[count:], workspace)

    # Settings of torch that decide which kernels a pass launches.
    switches = (torch.backends.cuda.matmul.fp32_precision, torch.are_deterministic_algorithms_enabled())
    return cuda_graph.cache(s.graphs)(captured, [*moving, *extra], [*parameters, *buffers], (s, *kind, *switches))


# -- phase 1 as an operator: losses and their gradients out of one call, so that torch.compile sees a single node


def _arguments(flat: Sequence[Any]) -> tuple[PassInputs, Settings, Wanted]:
    """The operator's flat arguments, by name."""
    rest = iter(flat)
    return unflatten(PassInputs, rest), unflatten(Settings, rest), unflatten(Wanted, rest)


def metric_op(*flat: Any) -> list[Tensor]:
    """The operator of phase 1: its flat arguments are those of PassInputs, Settings and Wanted."""
    inputs, settings, wanted = _arguments(flat)
    if not _is_captured(settings):
        return _run_metric(inputs, settings, wanted, workspace_for(inputs.z.device)).flat()

    def run(inputs: PassInputs, s: Settings, _: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
        return _run_metric(inputs, s, wanted, workspace).flat()

    return _replay(inputs, (), settings, ("metric", *wanted), run)


def _run_metric(inputs: PassInputs, s: Settings, wanted: Wanted, workspace: Workspace) -> MetricOutputs:
    z = inputs.z
    with torch.autocast(z.device.type, enabled=False):
        prepared = _prepare(inputs, s, workspace, record=any(wanted), update=s.training)
        result = metric_pass(prepared.graph, prepared.mixing, inputs.classes, wanted.want_z)
    gradients = []
    if wanted.want_parameters:  # contiguous, as the fake says, whatever the weights are
        gradients = [result.parameters[name].contiguous() for name in metric_names(s.layers)]
    dz = (z.new_empty(0) if d is None else d for d in (result.dz_synthetic, result.dz_entropy))
    return MetricOutputs(result.synthetic, result.node_entropy, prepared.statistics, *dz, gradients)


def _metric_fake(*flat: Any) -> list[Tensor]:
    inputs, settings, wanted = _arguments(flat)
    z, layers = inputs.z, settings.layers
    gradients = []
    if wanted.want_parameters:
        named = dict(zip(parameter_names(layers), inputs.parameters, strict=True))
        gradients = [named[name].new_empty(named[name].shape) for name in metric_names(layers)]
    statistics = [torch.empty_like(b) for b in (*inputs.buffers[:3], *inputs.buffers[4:7])]
    dz = [torch.empty_like(z) if wanted.want_z else z.new_empty(0) for _ in range(2)]
    return MetricOutputs(z.new_empty(()), z.new_empty(()), statistics, *dz, gradients).flat()


def _metric_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)  # which would be zeros, as large as all that this operator returns
    pass_inputs, settings, ctx.wanted = _arguments(inputs)
    ctx.layers, ctx.buffers = settings.layers, len(pass_inputs.buffers)
    outputs = metric_outputs(output)
    ctx.save_for_backward(outputs.dz_synthetic, outputs.dz_entropy, *outputs.gradients)


def _metric_backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
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


define_operator("metric_pass", (PassInputs, Settings, Wanted), "Tensor[]", metric_op, _metric_fake)
differentiate_operator("metric_pass", _metric_backward, _metric_setup)


# -- phase 3, eager


class GeneratorPass(torch.autograd.Function):
    """J_gen, its parts and the running statistics, as a function of the graph network's parameters."""

    @staticmethod
    def forward(ctx: Any, inputs: PassInputs, s: Settings, targets: GeneratorTargets, *parameters: Tensor) -> Any:
        """Runs phase 3.

        Args:
            ctx: of autograd.
            inputs: the pass's tensors, without parameters: autograd needs those as arguments of their own.
            s: everything else.
            targets: what the losses compare with; their classes are those of the inputs.
            parameters: the graph network's parameters (see parameter_list).
        """
        want = any(ctx.needs_input_grad)
        inputs = inputs._replace(parameters=list(parameters))

        def run(inputs: PassInputs, s: Settings, extra: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
            weight, bias, *zeroed = extra
            moved = targets._replace(
                classes=inputs.classes, classifier=(weight, bias), zeroed=zeroed[0] if zeroed else None
            )
            return _run_generator(inputs, s, moved, want, workspace).flat()

        weights = targets.weights
        if _is_captured(s):
            extra = (*targets.classifier, *(() if targets.zeroed is None else (targets.zeroed,)))
            out = generator_outputs(_replay(inputs, extra, s, ("generator", weights, want), run))
        else:
            out = _run_generator(inputs, s, targets, want, workspace_for(inputs.z.device))
        ctx.layers, ctx.gradients = s.layers, out.gradients
        ctx.mark_non_differentiable(*out.values, *out.statistics)
        entropy, dissimilarity, diversity = out.values
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


def _run_generator(
    inputs: PassInputs, s: Settings, targets: GeneratorTargets, want: bool, workspace: Workspace
) -> GeneratorOutputs:
    with torch.autocast(inputs.z.device.type, enabled=False):
        prepared = _prepare(inputs, s, workspace, record=want, update=s.training)
        result = generator_pass(prepared.graph, prepared.mixing, targets)
    gradients = [result.parameters[name] for name in generator_names(s.layers)] if want else []
    values = [result.negative_entropy, result.dissimilarity, result.diversity]
    return GeneratorOutputs(values, prepared.statistics, gradients)
