"""The two passes of a training step as autograd and torch.compile see them.

A pass forms its losses and their gradients together, so each is one operator: forward runs it, backward scales what it
returned by the upstream gradient. Nothing of the batch's edges outlives the forward.
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
from gcahng.engine.plan import MODES, StepSize, choose_memory
from gcahng.engine.precision import DTYPES
from gcahng.engine.ranks import ranks_of
from gcahng.engine.schedule import default_tile_rows, make_schedule
from gcahng.engine.schema import NATIVE, library, schema_of, unflatten
from gcahng.engine.stages import make_stages, ops_of
from gcahng.engine.stages.common import StageContext
from gcahng.engine.stages.mix import Mixing, mixing_of
from gcahng.engine.weights import generator_names, metric_names, parameter_names
from gcahng.engine.workspace import Workspace, WorkspaceOfThread

_workspace = WorkspaceOfThread()


class PassInputs(NamedTuple):
    """The tensors that a pass takes.

    Attributes:
        z: embeddings (n, D) in canonical order.
        classes: (C,) labels of the batch's classes.
        pull: exp(−α / J̄_m), 0-dim.
        u: mixing draws (K, K − 1).
        draw: the number of the pass, 0-dim int64.
        parameters: of the graph network (see parameter_list).
        buffers: of its BatchNorms (see buffer_list).
    """

    z: Tensor
    classes: Tensor
    pull: Tensor
    u: Tensor
    draw: Tensor
    parameters: list[Tensor]
    buffers: list[Tensor]


class Settings(NamedTuple):
    """What a pass needs beside tensors; plain values, so that torch can trace them.

    Attributes:
        layers, heads, views: L, H and K.
        p, seed, symmetric: of dropout; symmetric says that half of the pairs are computed.
        training: whether BatchNorms take the batch's statistics.
        momentum, eps: of the BatchNorms.
        compute: dtype of products, by name.
        implementation: of the stages, as gcahng.dispatch names it.
        edge_memory, edge_dtype: see GCAHNGLoss.
        graphs: number of the gcahng.engine.cuda_graph.GraphCache that keeps the captured pass; 0: it is not captured.
        ranks: number of the gcahng.engine.ranks.Ranks; 0: a process of its own.
    """

    layers: int
    heads: int
    views: int
    p: float
    seed: int
    symmetric: bool
    training: bool
    momentum: float
    eps: float
    compute: str
    implementation: str
    edge_memory: str
    edge_dtype: str
    graphs: int
    ranks: int


class Wanted(NamedTuple):
    """Which gradients of phase 1 are wanted."""

    want_z: bool
    want_parameters: bool


# -- one pass


class _Pass(NamedTuple):
    graph: GraphPass
    mixing: Mixing
    statistics: list[Tensor]  # edge mean, variance, count, node mean, variance, count


def _prepare(inputs: PassInputs, s: Settings, workspace: Workspace, record: bool, update: bool) -> _Pass:
    """record: a backward will follow; update: the running statistics follow."""
    z, compute = inputs.z.detach(), DTYPES[s.compute]
    named = dict(zip(parameter_names(s.layers), (p.detach() for p in inputs.parameters), strict=True))
    memory = edge_memory(z, named["class_head.weight"].shape[0], s)
    rows = default_tile_rows(z.shape[1], compute, memory, z.device.type)
    sizes = (z.shape[0] // s.views, s.views)
    schedule = make_schedule(*sizes, symmetric=s.symmetric, tile_rows=rows, ranks=ranks_of(s.ranks))
    dropout = EdgeDropout(s.p, s.seed, inputs.draw) if s.training and s.p > 0 else None
    ops = ops_of(s.implementation)
    fused = (workspace, ops) if ops is not None else (None, None)
    stages = make_stages(StageContext(schedule, z.shape[1], compute, z, dropout, s.layers, *fused))
    # The operator is functional: running statistics are copied here and copied back by its caller.
    copies = [b.clone() for b in inputs.buffers]
    options = GraphOptions(s.heads, compute, s.training, update, s.momentum, s.eps, memory, DTYPES[s.edge_dtype])
    graph = GraphPass(named, copies, z, stages, options, record)
    mixing = mixing_of(schedule, z, inputs.u, inputs.pull)
    return _Pass(graph, mixing, [*copies[:3], *copies[4:7]])


def workspace_for(device: torch.device) -> Workspace:
    """The thread's buffers, or, in a graph of the caller's, which keeps the memory that a pass takes, new ones."""
    if cuda_graph.capturing():
        return Workspace()
    _workspace.follow(device)
    return _workspace


def edge_memory(z: Tensor, num_classes: int, s: Settings) -> str:
    """store, hidden or recompute; what "auto" stands for now."""
    if s.edge_memory != "auto":
        return s.edge_memory
    ranks = ranks_of(s.ranks)
    count = 1 if ranks is None else ranks.count
    sizes = (*z.shape, s.layers, s.views, num_classes)
    dtypes = (DTYPES[s.compute], z.dtype, DTYPES[s.edge_dtype])
    size = StepSize(*sizes, *dtypes, s.symmetric, s.implementation, z.device.type, count)
    if ranks is None:
        return choose_memory(size, free_memory(z.device))

    def least() -> int:
        free = free_memory(z.device)
        if free is not None and z.device.type == "cpu":
            free //= count  # they may all be on this machine
        return MODES.index(choose_memory(size, free))

    return MODES[ranks.agree(size, least, z.device)]


def graph_pass(inputs: PassInputs, s: Settings) -> GraphPass:
    """The graph network on a batch, without gradients and without touching any state."""
    workspace = workspace_for(inputs.z.device)
    with torch.autocast(inputs.z.device.type, enabled=False):
        return _prepare(inputs, s, workspace, record=False, update=False).graph


Run = Callable[[PassInputs, Settings, Sequence[Tensor], Workspace], list[Tensor]]


def _run(inputs: PassInputs, extra: Sequence[Tensor], s: Settings, kind: tuple[Any, ...], run: Run) -> list[Tensor]:
    """run(inputs, s, extra, workspace); where the loss asks for it, as a CUDA graph.

    Args:
        inputs, s: of the pass.
        extra: tensors beside the inputs, which may lie elsewhere each time.
        kind: what tells this pass from others of the same settings.
        run: the pass.
    """
    if not s.graphs or cuda_graph.capturing():
        return run(inputs, s, extra, workspace_for(inputs.z.device))
    s = s._replace(edge_memory=edge_memory(inputs.z, inputs.parameters[-1].shape[0], s))
    *moving, parameters, buffers = inputs
    count = len(moving)

    def captured(given: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
        return run(PassInputs(*given[:count], parameters, buffers), s, given[count:], workspace)

    # What of torch's own decides which kernels a pass launches.
    switches = (torch.backends.cuda.matmul.fp32_precision, torch.are_deterministic_algorithms_enabled())
    return cuda_graph.cache(s.graphs)(captured, [*moving, *extra], [*parameters, *buffers], (s, *kind, *switches))


# -- phase 1 as an operator: losses and their gradients out of one call, so that torch.compile sees a single node


class MetricOutputs(NamedTuple):
    """What phase 1 returns.

    Attributes:
        synthetic: J_syn, not yet weighted, 0-dim.
        entropy: J_gce, 0-dim.
        statistics: edge mean, variance, count, node mean, variance, count.
        dz_synthetic, dz_entropy: gradients of the two for z (n, D); empty where they are not wanted.
        gradients: of J_gce for the parameters of metric_names; none where they are not wanted.
    """

    synthetic: Tensor
    entropy: Tensor
    statistics: list[Tensor]
    dz_synthetic: Tensor
    dz_entropy: Tensor
    gradients: list[Tensor]

    def flat(self) -> list[Tensor]:
        """As the operator returns it."""
        losses, dz = (self.synthetic, self.entropy), (self.dz_synthetic, self.dz_entropy)
        return [*losses, *self.statistics, *dz, *self.gradients]


def metric_outputs(flat: Sequence[Any]) -> MetricOutputs:
    """What the operator returned, or the gradients of it."""
    losses, statistics, dz, gradients = flat[:2], flat[2:8], flat[8:10], flat[10:]
    return MetricOutputs(*losses, list(statistics), *dz, list(gradients))


def _arguments(flat: Sequence[Any]) -> tuple[PassInputs, Settings, Wanted]:
    rest = iter(flat)
    return unflatten(PassInputs, rest), unflatten(Settings, rest), unflatten(Wanted, rest)


def metric_op(*flat: Any) -> list[Tensor]:
    """Runs phase 1."""
    inputs, settings, wanted = _arguments(flat)

    def run(inputs: PassInputs, s: Settings, _: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
        return _run_metric(inputs, s, wanted, workspace).flat()

    return _run(inputs, (), settings, ("metric", *wanted), run)


def _run_metric(inputs: PassInputs, s: Settings, wanted: Wanted, workspace: Workspace) -> MetricOutputs:
    z = inputs.z
    with torch.autocast(z.device.type, enabled=False):
        one = _prepare(inputs, s, workspace, record=any(wanted), update=s.training)
        result = metric_pass(one.graph, one.mixing, inputs.classes, wanted.want_z)
    gradients = []
    if wanted.want_parameters:  # contiguous, as the fake says, whatever the weights are
        gradients = [result.parameters[name].contiguous() for name in metric_names(s.layers)]
    dz = (z.new_empty(0) if d is None else d for d in (result.dz_synthetic, result.dz_entropy))
    return MetricOutputs(result.synthetic, result.node_entropy, one.statistics, *dz, gradients)


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
    given, settings, ctx.wanted = _arguments(inputs)
    ctx.layers, ctx.buffers = settings.layers, len(given.buffers)
    found = metric_outputs(output)
    ctx.save_for_backward(found.dz_synthetic, found.dz_entropy, *found.gradients)


def _metric_backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    nothing, given = ctx.saved_tensors[0].new_zeros(()), metric_outputs(upstream)
    d_synthetic, d_entropy = (nothing if d is None else d for d in (given.synthetic, given.entropy))
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
    """dz of J_syn, dz of J_gce and the parameters' gradients, times the upstream gradients of the two losses."""
    dz_synthetic, dz_entropy, *parameters, d_synthetic, d_entropy = tensors
    return dz_synthetic * d_synthetic, dz_entropy * d_entropy, *(g * d_entropy for g in parameters)


_library = library(NATIVE)
_library.define(
    f"metric_pass({schema_of(PassInputs, Settings, Wanted)}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)
for _key in ("CPU", "CUDA"):
    _library.impl("metric_pass", metric_op, _key)
torch.library.register_fake("gcahng::metric_pass", _metric_fake, lib=_library)
torch.library.register_autograd("gcahng::metric_pass", _metric_backward, setup_context=_metric_setup, lib=_library)


# -- phase 3, eager


class GeneratorOutputs(NamedTuple):
    """What phase 3 returns.

    Attributes:
        values: CE before its factor, J_sim and J_div, 0-dim each.
        statistics: as in MetricOutputs.
        gradients: of J_gen for the parameters of generator_names; none where they are not wanted.
    """

    values: list[Tensor]
    statistics: list[Tensor]
    gradients: list[Tensor]

    def flat(self) -> list[Tensor]:
        """As a captured pass returns it."""
        return [*self.values, *self.statistics, *self.gradients]


def generator_outputs(flat: Sequence[Tensor]) -> GeneratorOutputs:
    """What a pass returned."""
    return GeneratorOutputs(list(flat[:3]), list(flat[3:9]), list(flat[9:]))


class GeneratorPass(torch.autograd.Function):
    """J_gen, its parts and the running statistics, as a function of the graph network's parameters."""

    @staticmethod
    def forward(ctx: Any, inputs: PassInputs, s: Settings, targets: GeneratorTargets, *parameters: Tensor) -> Any:
        """inputs hold no parameters: those are given apart, for autograd. targets' classes are the inputs'."""
        want = any(ctx.needs_input_grad)
        inputs = inputs._replace(parameters=list(parameters))

        def run(inputs: PassInputs, s: Settings, given: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
            zeroed = given[2] if len(given) > 2 else None
            moved = targets._replace(classes=inputs.classes, classifier=(given[0], given[1]), zeroed=zeroed)
            return _run_generator(inputs, s, moved, want, workspace).flat()

        extra = (*targets.classifier, *(() if targets.zeroed is None else (targets.zeroed,)))
        weights = targets.weights
        out = generator_outputs(_run(inputs, extra, s, ("generator", weights, want), run))
        ctx.layers, ctx.gradients = s.layers, out.gradients
        ctx.mark_non_differentiable(*out.values, *out.statistics)
        entropy, dissimilarity, diversity = out.values
        total = weights.soft * entropy + weights.similarity * dissimilarity + weights.diversity * diversity
        return total, *out.values, *out.statistics

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_: Any) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the generator pass was differentiated before: its gradients were scaled where they lay")
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
        one = _prepare(inputs, s, workspace, record=want, update=s.training)
        result = generator_pass(one.graph, one.mixing, targets)
    gradients = [result.parameters[name] for name in generator_names(s.layers)] if want else []
    values = [result.negative_entropy, result.dissimilarity, result.diversity]
    return GeneratorOutputs(values, one.statistics, gradients)
