"""What comes before a pass: the memory mode, the schedule, the stages and the graph network of a batch.

`replayable` makes a pass of a function that needs all this. With `cuda_graph=True` it captures and replays it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcahng.engine import cuda_graph
from gcahng.engine.free_memory import free_memory
from gcahng.engine.graph import GraphPass
from gcahng.engine.graph_options import GraphOptions
from gcahng.engine.masks import EdgeDropout
from gcahng.engine.operands import GeneratorOutputs, MetricOutputs, PassInputs, Settings
from gcahng.engine.plan import MODES, StepSize, choose_memory
from gcahng.engine.precision import DTYPES
from gcahng.engine.ranks import ranks_of
from gcahng.engine.schedule import default_tile_rows, make_schedule
from gcahng.engine.schema import flatten, unflatten
from gcahng.engine.stages import make_stages, ops_of
from gcahng.engine.stages.common import StageContext
from gcahng.engine.stages.mix import Mixing, mixing_of
from gcahng.engine.weights import parameter_names
from gcahng.engine.workspace import Workspace, WorkspaceOfThread

_workspace = WorkspaceOfThread()


class Prepared(NamedTuple):
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


def prepare(inputs: PassInputs, s: Settings, workspace: Workspace, record: bool, update: bool) -> Prepared:
    """Prepares a pass.

    Args:
        inputs: the pass's tensors.
        s: everything else.
        workspace: memory for the stages.
        record: whether a backward will follow.
        update: whether the running statistics follow those of the batch.
    """
    z, compute, edge_dtype = inputs.z, DTYPES[s.compute], DTYPES[s.edge_dtype]
    # Triton's kernels take weights by their shape alone.
    named = dict(zip(parameter_names(s.layers), (p.contiguous() for p in inputs.parameters), strict=True))
    memory = edge_memory(z, named["class_head.weight"].shape[0], s)
    rows = default_tile_rows(z.shape[1], compute, memory, z.device.type)
    sizes = (z.shape[0] // s.views, s.views)
    schedule = make_schedule(*sizes, symmetric=s.symmetric, tile_rows=rows, ranks=ranks_of(s.ranks))
    dropout = EdgeDropout(s.p, s.seed, inputs.draw) if s.training and s.p > 0 else None
    ops = ops_of(s.implementation)
    stages = make_stages(StageContext(schedule, z.shape[1], compute, z, dropout, s.layers, workspace, ops, edge_dtype))
    # The operator is functional: running statistics are copied here and copied back by its caller.
    copies = list(torch._foreach_mul(inputs.buffers, 1))
    options = GraphOptions(s.heads, compute, s.training, update, s.momentum, s.eps, memory, edge_dtype)
    graph = GraphPass(named, copies, z, stages, options, record)
    mixing = mixing_of(stages.context, z, inputs.u, inputs.pull)
    return Prepared(graph, mixing, [*copies[:3], *copies[4:7]])


def graph_pass(inputs: PassInputs, s: Settings) -> GraphPass:
    """Prepares the graph network for a batch, without gradients and without changing any state."""
    workspace = workspace_for(inputs.z.device)
    with torch.autocast(inputs.z.device.type, enabled=False), torch.no_grad():
        return prepare(inputs, s, workspace, record=False, update=False).graph


# -- memory


def workspace_for(device: torch.device) -> Workspace:
    """The workspace of a pass: this thread's, or a new one in the capture of a CUDA graph or among fake tensors.

    Such a graph owns the memory that it was captured with, so that no other pass may use it. Fake tensors are of no use
    to any other pass.
    """
    if cuda_graph.capturing() or _tracing_fake_tensors():
        return Workspace()
    _workspace.follow(device)
    return _workspace


def _tracing_fake_tensors() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


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
        return choose_memory(size, _free_for(z, s))

    def own_mode() -> int:
        free = _free_for(z, s)
        if free is not None and z.device.type == "cpu":
            free //= count  # they may all be on this machine
        return MODES.index(choose_memory(size, free))

    return MODES[ranks.agree(size, own_mode, z.device)]


def _free_for(z: Tensor, s: Settings) -> int | None:
    """Bytes that a step may take; None where they are not known.

    Other passes cannot have what captured graphs keep for themselves. A step that has been captured already has what
    its graphs hold.
    """
    free = free_memory(z.device)
    if free is None or z.device.type != "cuda":
        return free
    own = cuda_graph.cache(s.graphs).held_for(_kind(z, s)) if s.graphs else 0
    return free - cuda_graph.idle_memory(z.device) + own


# -- CUDA graphs


def _kind(z: Tensor, s: Settings) -> tuple[Any, ...]:
    """The kind of batch of embeddings z (n, D) under settings whose edge_memory is as it was asked for."""
    return tuple(z.shape), z.dtype, s


Outputs = MetricOutputs | GeneratorOutputs
Run = Callable[[PassInputs, Settings, Any, Workspace], Outputs]


def replayable(run: Run) -> Callable[[PassInputs, Settings, Any], list[Tensor]]:
    """Makes a pass of a function: run(inputs, s, task, workspace) becomes run(inputs, s, task), whose result is flat.

    The pass runs the function, outside autocast and in the memory of this thread; or, if the settings ask for it, as a
    CUDA graph, which is captured the first time. Where the caller is capturing a whole step, the function just runs.

    Args:
        run: `task` is a NamedTuple of tensors and of plain values, which say what is wanted of the pass.
    """

    @wraps(run)
    def run_or_replay(inputs: PassInputs, s: Settings, task: Any) -> list[Tensor]:
        with torch.autocast(inputs.z.device.type, enabled=False), torch.no_grad():
            if s.graphs and not cuda_graph.capturing():
                return _replay(run, inputs, s, task)
            return run(inputs, s, task, workspace_for(inputs.z.device)).flat()

    return run_or_replay


def _replay(run: Run, inputs: PassInputs, s: Settings, task: Any) -> list[Tensor]:
    """Runs a pass as a CUDA graph; see `replayable`."""
    kind = _kind(inputs.z, s)
    s = s._replace(edge_memory=edge_memory(inputs.z, inputs.parameters[-1].shape[0], s))
    *moving, parameters, buffers = inputs  # each step has other embeddings, but the same weights
    leaves = flatten(type(task), task)
    plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def captured(copies: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
        own = PassInputs(*copies[: len(moving)], parameters, buffers)
        rest = iter(copies[len(moving) :])
        moved = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return run(own, s, unflatten(type(task), iter(moved)), workspace).flat()

    # Settings of torch that decide which kernels a pass launches.
    switches = (torch.backends.cuda.matmul.fp32_precision, torch.are_deterministic_algorithms_enabled())
    settings = (s, run.__name__, *plain, *switches)
    return cuda_graph.cache(s.graphs)(captured, [*moving, *tensors], [*parameters, *buffers], settings, kind)
