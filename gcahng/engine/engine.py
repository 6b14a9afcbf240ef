"""The engine as an implementation of the loss: what GCAHNGLoss calls, and how its two passes enter autograd and
torch.compile.

A pass forms its losses and their gradients together, so each is one operator: forward runs it, backward scales what it
returned by the upstream gradient. Nothing of the batch's edges outlives the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gcahng.engine import cuda_graph, limits, passes
from gcahng.engine.cuda_graph import GraphCache
from gcahng.engine.free_memory import free_memory
from gcahng.engine.graph import GraphOptions, GraphPass
from gcahng.engine.judge import TorchJudge
from gcahng.engine.masks import EdgeDropout
from gcahng.engine.mixing import TorchMixer, mixing_weights
from gcahng.engine.parts import make_parts
from gcahng.engine.plan import MODES, StepSize, choose_memory
from gcahng.engine.precision import DTYPES, compute_dtype, note_bf16
from gcahng.engine.ranks import Ranks, ranks_of
from gcahng.engine.schedule import default_tile_rows, make_schedule
from gcahng.engine.weights import buffer_list, generator_names, metric_names, parameter_list, parameter_names
from gcahng.engine.workspace import Workspace, WorkspaceOfThread
from gcahng.errors import UserError
from gcahng.nn import GraphNetwork
from gcahng.ops._once import once
from gcahng.ops._schemas import NATIVE, library
from gcahng.reference.head import momentum
from gcahng.reference.losses import official_own_entries
from gcahng.reference.passes import Batch, GeneratorLosses, GeneratorWeights, MetricLosses, generated

_workspace = WorkspaceOfThread()


class Settings(NamedTuple):
    """What an operator needs beside tensors; plain values, so that torch can trace them."""

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
    stages: str
    edge_memory: str
    edge_dtype: str
    graphs: int  # of gcahng.engine.cuda_graph; 0: not captured
    ranks: int  # of gcahng.engine.ranks; 0: a process of its own


class _Pass(NamedTuple):
    graph: GraphPass
    mixer: TorchMixer
    judge: TorchJudge
    classes: Tensor
    buffers: list[Tensor]


def _prepare(
    z: Tensor,
    classes: Tensor,
    pull: Tensor,
    u: Tensor,
    draw: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    s: Settings,
    record: bool,
    update: bool,
    workspace: Workspace,
) -> _Pass:
    dim, z = z.shape[1], z.detach()
    named = dict(zip(parameter_names(s.layers), (p.detach() for p in parameters), strict=True))
    compute = DTYPES[s.compute]
    memory = _edge_memory(z, named["class_head.weight"].shape[0], s)
    rows = default_tile_rows(dim, compute, memory, z.device.type)
    sizes = (z.shape[0] // s.views, s.views)
    schedule = make_schedule(*sizes, symmetric=s.symmetric, tile_rows=rows, ranks=ranks_of(s.ranks))
    options = GraphOptions(s.heads, compute, s.training, update, s.momentum, s.eps, memory, DTYPES[s.edge_dtype])
    dropout = EdgeDropout(s.p, s.seed, draw) if s.training and s.p > 0 else None
    kappa = mixing_weights(u)
    parts = make_parts(s.stages, schedule, compute, z, pull, kappa, dropout, s.layers, workspace)
    # The operator is functional: running statistics are copied here and copied back by its caller.
    copies = [b.clone() for b in buffers]
    graph = GraphPass(named, copies, z, schedule, parts.stages, parts.head, options, record)
    return _Pass(graph, parts.mixer, parts.judge, classes, copies)


def _room(device: torch.device) -> Workspace:
    """The thread's buffers, or, in a graph of the caller's, which keeps the memory that a pass takes, new ones."""
    if cuda_graph.capturing():
        return Workspace()
    _workspace.follow(device)
    return _workspace


def _switches() -> tuple[str, bool]:
    """What of torch's own decides which kernels a pass launches."""
    return torch.backends.cuda.matmul.fp32_precision, torch.are_deterministic_algorithms_enabled()


def _edge_memory(z: Tensor, num_classes: int, s: Settings) -> str:
    """store, hidden or recompute; what "auto" stands for now."""
    if s.edge_memory != "auto":
        return s.edge_memory
    ranks = ranks_of(s.ranks)
    count = 1 if ranks is None else ranks.count
    sizes = (*z.shape, s.layers, s.views, num_classes)
    dtypes = (DTYPES[s.compute], z.dtype, DTYPES[s.edge_dtype])
    size = StepSize(*sizes, *dtypes, s.symmetric, s.stages, z.device.type, count)
    if ranks is None:
        return choose_memory(size, free_memory(z.device))

    def least() -> int:
        free = free_memory(z.device)
        if free is not None and z.device.type == "cpu":
            free //= count  # they may all be on this machine
        return MODES.index(choose_memory(size, free))

    return MODES[ranks.agree(size, least, z.device)]


def _statistics(buffers: list[Tensor]) -> list[Tensor]:
    """Edge mean, variance, count, node mean, variance, count."""
    return [*buffers[:3], *buffers[4:7]]


def _run_metric(
    tensors: tuple[Any, ...], s: Settings, want_z: bool, want_parameters: bool, workspace: Workspace
) -> list[Tensor]:
    z = tensors[0]
    with torch.autocast(z.device.type, enabled=False):
        run = _prepare(*tensors, s, record=want_z or want_parameters, update=s.training, workspace=workspace)
        found = passes.metric_pass(run.graph, run.mixer, run.classes, want_z)
    # Contiguous, as _metric_fake says, whatever the weights are.
    gradients = [found.parameters[n].contiguous() for n in metric_names(s.layers)] if want_parameters else []
    dz = [z.new_empty(0) if d is None else d for d in (found.dz_synthetic, found.dz_entropy)]
    return [found.synthetic, found.node_entropy, *_statistics(run.buffers), *dz, *gradients]


def _run_generator(
    tensors: tuple[Any, ...],
    s: Settings,
    classifier: tuple[Tensor, Tensor],
    zeroed: Tensor | None,
    weights: GeneratorWeights,
    want: bool,
    workspace: Workspace,
) -> list[Tensor]:
    with torch.autocast(tensors[0].device.type, enabled=False):
        run = _prepare(*tensors, s, record=want, update=s.training, workspace=workspace)
        found = passes.generator_pass(run.graph, run.mixer, run.judge, run.classes, classifier, zeroed, weights)
    gradients = [found.parameters[n] for n in generator_names(s.layers)] if want else []
    values = [found.negative_entropy, found.dissimilarity, found.diversity]
    return [*values, *_statistics(run.buffers), *gradients]


def _run(
    tensors: tuple[Any, ...],
    extra: Sequence[Tensor],
    s: Settings,
    kind: tuple[Any, ...],
    run: Callable[[tuple[Any, ...], Settings, Sequence[Tensor], Workspace], list[Tensor]],
) -> list[Tensor]:
    """run(tensors, s, extra, workspace); where the loss asks for it, as a CUDA graph. kind: what tells this pass from
    others of the same settings; extra: tensors beside the operator's, which may lie elsewhere each time."""
    if not s.graphs or cuda_graph.capturing():
        return run(tensors, s, extra, _room(tensors[0].device))
    *inputs, parameters, buffers = tensors
    s = s._replace(edge_memory=_edge_memory(inputs[0], parameters[-1].shape[0], s))
    count = len(inputs)

    def captured(given: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
        return run((*given[:count], parameters, buffers), s, given[count:], workspace)

    return cuda_graph.cache(s.graphs)(captured, [*inputs, *extra], [*parameters, *buffers], (s, *kind, *_switches()))


# -- phase 1 as an operator: losses and their gradients out of one call, so that torch.compile sees a single node


def _metric_op(*arguments: Any) -> list[Tensor]:
    *settings, want_z, want_parameters = arguments[_TENSORS:]
    wanted = (want_z, want_parameters)

    def run(tensors: tuple[Any, ...], s: Settings, _: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
        return _run_metric(tensors, s, *wanted, workspace)

    return _run(arguments[:_TENSORS], (), Settings(*settings), ("metric", *wanted), run)


def _metric_fake(*arguments: Any) -> list[Tensor]:
    z, *_, parameters, buffers = arguments[:_TENSORS]
    *settings, want_z, want_parameters = arguments[_TENSORS:]
    layers = Settings(*settings).layers
    named = dict(zip(parameter_names(layers), parameters, strict=True))
    gradients = [named[n].new_empty(named[n].shape) for n in metric_names(layers)] if want_parameters else []
    dz = [torch.empty_like(z) if want_z else z.new_empty(0) for _ in range(2)]
    return [z.new_empty(()), z.new_empty(()), *map(torch.empty_like, _statistics(buffers)), *dz, *gradients]


def _metric_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)  # which would be zeros, as large as all that this operator returns
    *settings, ctx.want_z, ctx.want_parameters = inputs[_TENSORS:]
    ctx.layers = Settings(*settings).layers
    ctx.buffers, ctx.options = len(inputs[_TENSORS - 1]), len(inputs) - _TENSORS
    ctx.save_for_backward(*output[_GRADIENTS:])


def _metric_backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    nothing = ctx.saved_tensors[0].new_zeros(())
    d_synthetic, d_entropy = (nothing if d is None else d for d in gradients[:2])
    dz_synthetic, dz_entropy, *found = once("the engine", _scale, *ctx.saved_tensors, d_synthetic, d_entropy)
    dz = dz_synthetic + dz_entropy if ctx.want_z else None
    named = dict(zip(metric_names(ctx.layers), found, strict=True)) if ctx.want_parameters else {}
    parameters = [named.get(n) for n in parameter_names(ctx.layers)]
    return dz, None, None, None, None, parameters, [None] * ctx.buffers, *[None] * ctx.options


def _scale(*tensors: Tensor) -> tuple[Tensor, ...]:
    """dz of J_syn, dz of J_gce and the parameters' gradients, times the upstream gradients of the two losses."""
    dz_synthetic, dz_entropy, *parameters, d_synthetic, d_entropy = tensors
    return dz_synthetic * d_synthetic, dz_entropy * d_entropy, *(g * d_entropy for g in parameters)


_TENSORS = 7  # of the operator's arguments, lists of tensors included: before the settings and what is wanted
_GRADIENTS = 8  # of the operator's outputs: behind two losses and six statistics
_SETTINGS = (
    "int layers, int heads, int views, float p, int seed, bool symmetric, bool training, float momentum, float eps, "
    "str compute, str stages, str edge_memory, str edge_dtype, int graphs, int ranks"
)
_library = library(NATIVE)
_library.define(
    "metric_pass(Tensor z, Tensor classes, Tensor pull, Tensor u, Tensor draw, Tensor[] parameters, Tensor[] buffers, "
    f"{_SETTINGS}, bool want_z, bool want_parameters) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CPU", "CUDA"):
    _library.impl("metric_pass", _metric_op, _key)
torch.library.register_fake("gcahng::metric_pass", _metric_fake, lib=_library)
torch.library.register_autograd("gcahng::metric_pass", _metric_backward, setup_context=_metric_setup, lib=_library)

# -- phase 3, eager


class _GeneratorPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensors: tuple[Any, ...], s: Settings, extra: tuple[Any, ...], *parameters: Tensor) -> Any:
        classifier, zeroed, weights = extra
        want = any(ctx.needs_input_grad)
        tensors = (*tensors[:5], list(parameters), tensors[5])

        def run(tensors: tuple[Any, ...], s: Settings, given: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
            where = given[2] if len(given) > 2 else None
            return _run_generator(tensors, s, (given[0], given[1]), where, weights, want, workspace)

        moved = (*classifier, *(() if zeroed is None else (zeroed,)))
        out = _run(tensors, moved, s, ("generator", weights, want), run)
        values, statistics, gradients = out[:3], out[3:9], out[9:]
        ctx.layers, ctx.gradients = s.layers, gradients
        ctx.mark_non_differentiable(*values, *statistics)
        total = weights.soft * values[0] + weights.similarity * values[1] + weights.diversity * values[2]
        return total, *values, *statistics

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_: Any) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the generator pass was differentiated before: its gradients were scaled where they lay")
        found = once("the engine", lambda *g: tuple(x.mul_(g[-1]) for x in g[:-1]), *ctx.gradients, d_total)
        ctx.gradients = None
        named = dict(zip(generator_names(ctx.layers), found, strict=False))
        scaled = (named.get(n) for n in parameter_names(ctx.layers))
        return None, None, None, *scaled


class Engine:
    """stages: which implementation of the stages, and whether it was asked for by name; edge_memory, edge_dtype: see
    GCAHNGLoss; graphs: where captured passes are kept, None: they are not captured; ranks: the processes that share
    each batch's pairs, None: this one has them all."""

    def __init__(
        self,
        stages: str,
        edge_memory: str,
        edge_dtype: torch.dtype | None,
        graphs: GraphCache | None = None,
        *,
        ranks: Ranks | None = None,
        asked: bool = True,
    ) -> None:
        self.stages, self.asked, self.ranks = stages, asked, ranks
        self.edge_memory, self.edge_dtype, self.graphs = edge_memory, edge_dtype, graphs

    def metric_pass(self, network: GraphNetwork, batch: Batch) -> MetricLosses:
        """See gcahng.reference.passes.metric_pass."""
        s = self._settings(network, batch)
        parameters = parameter_list(network)
        if not torch.compiler.is_compiling():
            _refuse_transforms(batch.z, *parameters)
        record = torch.is_grad_enabled()
        want_z = record and batch.z.requires_grad
        want_parameters = record and any(p.requires_grad for p in parameters)
        tensors = (batch.z, batch.classes, batch.pull, batch.u, _draw(batch), parameters, buffer_list(network))
        synthetic, entropy, *rest = torch.ops.gcahng.metric_pass(*tensors, *s, want_z, want_parameters)
        if s.training:
            _store_statistics(network, rest[:6])
        return MetricLosses(synthetic, entropy)

    def generator_pass(
        self,
        network: GraphNetwork,
        classifier: nn.Linear,
        batch: Batch,
        official_order: Tensor | None,
        weights: GeneratorWeights,
    ) -> GeneratorLosses:
        """See gcahng.reference.passes.generator_pass."""
        s = self._settings(network, batch)
        zeroed = None if official_order is None else official_own_entries(batch.views, official_order)
        tensors = (batch.z.detach(), batch.classes, batch.pull, batch.u, _draw(batch), buffer_list(network))
        extra = ((classifier.weight.detach(), classifier.bias.detach()), zeroed, weights)
        total, *out = _GeneratorPass.apply(tensors, s, extra, *parameter_list(network))
        if s.training:
            _store_statistics(network, out[3:])
        return GeneratorLosses(total, *out[:3])

    @torch.no_grad()
    def generate(self, network: GraphNetwork, batch: Batch, anchors: Tensor | None) -> tuple[Tensor, Tensor]:
        """See gcahng.reference.passes.generate."""
        tensors = (
            batch.z,
            batch.classes,
            batch.pull,
            batch.u,
            _draw(batch),
            parameter_list(network),
            buffer_list(network),
        )
        s = self._settings(network, batch)  # outside: autocast says what products run in
        workspace = _room(batch.z.device)
        with torch.autocast(batch.z.device.type, enabled=False):
            run = _prepare(*tensors, s, record=False, update=False, workspace=workspace)
            return generated(batch, passes.coefficients(run.graph), anchors)

    def _stages_for(self, views: int, dim: int) -> str:
        """The stages that take so many samples a class and channels."""
        limit = limits.exceeded(self.stages, views, dim)
        if limit is None:
            return self.stages
        if not self.asked:
            return "torch"
        found = f"labels has {views} samples a class" if limit.what == "views" else f"embeddings has {dim} channels"
        raise UserError(f"{found}; impl={self.stages!r} takes up to {limit.most}, impl='torch' any number")

    def _settings(self, network: GraphNetwork, batch: Batch) -> Settings:
        dropout, norm = batch.dropout, network.edge_batch_norm
        dtype = batch.z.dtype
        if self.edge_dtype is torch.bfloat16:
            note_bf16(batch.z.device)
        return Settings(
            layers=len(network.layers),
            heads=network.heads,
            views=batch.views,
            p=0.0 if dropout is None else dropout.p,
            seed=0 if dropout is None else dropout.seed,
            symmetric=True if dropout is None else dropout.symmetric,
            training=batch.training,
            momentum=momentum(norm),
            eps=norm.eps,
            compute=_name(compute_dtype(batch.z.device, dtype)),
            stages=self._stages_for(batch.views, batch.z.shape[1]),
            edge_memory=self.edge_memory,
            edge_dtype=_name(self.edge_dtype or dtype),
            graphs=0 if self.graphs is None else self.graphs.number,
            ranks=0 if self.ranks is None else self.ranks.number,
        )


def _refuse_transforms(*tensors: Tensor) -> None:
    """UserError under torch.func's transforms and for forward-mode derivatives, which would be lost without a word."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if transformed or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise UserError(
            "the engine has backward-mode derivatives alone, outside torch.func; impl='reference' has all in eval mode"
        )


def _draw(batch: Batch) -> Tensor:
    if batch.dropout is not None:
        return batch.dropout.draw
    return torch.zeros((), dtype=torch.int64, device=batch.z.device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _store_statistics(network: GraphNetwork, statistics: list[Tensor]) -> None:
    with torch.no_grad():
        for number, norm in enumerate((network.edge_batch_norm, network.node_batch_norm)):
            mean, variance, count = statistics[3 * number : 3 * number + 3]
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            norm.num_batches_tracked.copy_(count)
