"""The options of GCAHNGLoss: which values they accept, and those of the engine."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from gcahng.bounds import check_number, shown_value
from gcahng.errors import UserError
from gcahng.losses.synthetic import SyntheticOptions
from gcahng.nn import GraphAblation

_CHOICES = {
    "compat": ("fixed", "official"),
    "impl": ("auto", "reference", "torch", "cpp", "cuda", "triton"),
    "check": ("auto", "raise", "deferred", "off"),
    "edge_memory": ("auto", "store", "hidden", "recompute"),
}
_NUMBERS = (
    "num_classes",
    "embedding_dim",
    "layers",
    "heads",
    "alpha",
    "beta",
    "dot_weight",
    "div_weight",
    "softmax_factor",
    "edge_dropout",
    "graph_lr",
    "graph_weight_decay",
    "classifier_lr",
    "classifier_weight_decay",
    "clip_value",
)
_MAY_BE_NONE = ("num_per_class", "epochs", "steps_per_epoch", "seed")
_EDGE_DTYPES = (None, torch.float32, torch.float64, torch.bfloat16)


RATES = ("graph_lr", "graph_weight_decay", "classifier_lr", "classifier_weight_decay")


@dataclass(frozen=True)
class EngineOptions:
    """How the passes of a training step are run. No option changes what is computed, beyond rounding.

    Attributes:
        impl: auto, reference, torch, cpp, cuda or triton (see gcahng.dispatch). An implementation that is asked for by
            name and is not available is an error.
        edge_memory: what the engine saves of the edges. "store" saves one D-vector per layer and pair. "hidden" saves
            their 4D hidden vectors too. "recompute" saves nothing of size n²·D, and needs more arithmetic. "auto"
            decides by free memory.
        edge_dtype: dtype of stored edges; None is the parameters' own. torch.bfloat16 halves their memory.
        cuda_graph: on CUDA, whether the graph network's passes are captured and replayed. It is for batches so small
            that kernel launches take most of the time. Each of the last 4 kinds of batches then holds the memory of its
            passes. A user may capture a whole step in a graph of their own instead (docs/gpu.md), since the optimizers
            have their learning rates on the device. With check="deferred" and num_per_class a step then never waits
            for the device, and end_epoch raises.
        process_group: "world" or a torch.distributed group whose processes share the work on the pairs of each batch.
            Each process passes its part of the batch; all parts must have the same size. Every call must then be made
            by all processes, and each gets the whole batch's loss. The gradients of their embeddings are such that
            DistributedDataParallel's mean over processes is the gradient of the whole batch's loss. Before the first
            batch the first process's state is copied to all, and the loss's weights stay equal without further help
            (DistributedDataParallel around it needs find_unused_parameters=True). With "alone" each process has a graph
            network and batches of its own; None means the same, but warns if there are several processes.
    """

    impl: str = "auto"
    edge_memory: str = "auto"
    edge_dtype: torch.dtype | None = None
    cuda_graph: bool = False
    process_group: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineOptions:
        """The options themselves: they do not change, and a process group cannot be copied."""
        return self


_CLASSES = (EngineOptions, GraphAblation, SyntheticOptions)


class Options(NamedTuple):
    """Those options of GCAHNGLoss that are fields of a class of their own."""

    engine: EngineOptions
    ablation: GraphAblation
    synthetic: SyntheticOptions


def split_knobs(engine: EngineOptions | None, knobs: Mapping[str, Any]) -> Options:
    """Puts together the options of GCAHNGLoss that are fields of a class of their own.

    Args:
        engine: all options of the engine, or None.
        knobs: single fields of these classes, as keywords of GCAHNGLoss.

    Raises:
        TypeError: a keyword is not among the fields, as for any other function.
        UserError: `engine` is no EngineOptions, or was passed beside a field of it.
    """
    rest = dict(knobs)
    of_engine, of_graph, of_synthetic = (
        {f.name: rest.pop(f.name) for f in fields(cls) if f.name in rest} for cls in _CLASSES
    )
    if rest:
        raise TypeError(f"GCAHNGLoss() got an unexpected keyword argument {next(iter(rest))!r}")
    return Options(_engine_options(engine, of_engine), GraphAblation(**of_graph), SyntheticOptions(**of_synthetic))


def _engine_options(engine: EngineOptions | None, knobs: Mapping[str, Any]) -> EngineOptions:
    if engine is None:
        return EngineOptions(**knobs)
    if not isinstance(engine, EngineOptions):
        raise UserError(f"engine is a {type(engine).__name__}; it must be an EngineOptions")
    if knobs:
        raise UserError(
            f"engine and {next(iter(knobs))} are both set; options of the engine must be set in one of these ways only"
        )
    return engine


def plain_numbers(init: Callable[..., None]) -> Callable[..., None]:
    """Decorates GCAHNGLoss's constructor to turn numpy's scalars into Python's numbers.

    `labels.max() + 1` is a number of classes, but a state that holds such a scalar does not load with
    weights_only=True. The signature also gets the fields of the classes in Options.

    Args:
        init: the constructor.
    """

    @functools.wraps(init)
    def call(self: Any, *positional: Any, **named: Any) -> None:
        init(self, *map(_plain, positional), **{name: _plain(value) for name, value in named.items()})

    signature = inspect.signature(init)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    of_classes = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for cls in reversed(_CLASSES)
        for f in fields(cls)
    ]
    call.__signature__ = signature.replace(parameters=[*own, *of_classes])  # type: ignore[attr-defined]
    return call


def check_options(options: Mapping[str, Any]) -> None:
    """Checks the options of GCAHNGLoss and of the engine.

    Args:
        options: their values by name.

    Raises:
        UserError: an option is not what it must be.
    """
    for name, allowed in _CHOICES.items():
        if options[name] not in allowed:
            raise UserError(f"{name} is {shown_value(options[name])}; it must be one of {', '.join(allowed)}")
    for name in _NUMBERS:
        check_number(name, options[name])
    for name in _MAY_BE_NONE:
        check_number(name, options[name], none="None")
    if options["edge_dtype"] not in _EDGE_DTYPES:
        raise UserError(f"edge_dtype is {options['edge_dtype']!r}; it must be None, torch.float32, float64 or bfloat16")
    for name in ("symmetric", "cuda_graph"):
        if not isinstance(options[name], bool):
            raise UserError(f"{name} is {options[name]!r}; it must be True or False")
    shared = options["process_group"] not in (None, "alone")
    if options["synthetic"] == "base" and options["base"] != "npair":
        for name, given in (("cuda_graph", options["cuda_graph"]), ("process_group", shared)):
            if given:
                raise UserError(
                    f'synthetic is "base" and {name} is given; with it synthetic must be "npair" or "cosine"'
                )
    own = next(
        (name for name, theirs in (("synthetic", "npair"), ("anchor_gradient", True)) if options[name] != theirs), ""
    )
    if options["compat"] == "official" and own:
        raise UserError(
            f"{own} is {options[own]!r} and compat is 'official', which repeats what the authors' code does; compat "
            "must be 'fixed'"
        )
    if options["cuda_graph"] and shared:
        raise UserError("cuda_graph is True and process_group is given; process_group does not support cuda_graph")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
