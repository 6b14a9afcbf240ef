"""What GCAHNGLoss accepts as options, and how its passes are run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

import numpy as np
import torch

from gcahng.errors import UserError

_CHOICES = {
    "compat": ("fixed", "official"),
    "impl": ("auto", "reference", "torch", "cpp", "cuda", "triton"),
    "check": ("auto", "raise", "deferred", "off"),
    "edge_memory": ("auto", "store", "hidden", "recompute"),
}
_POSITIVE = ("alpha", "beta", "clip_value")
_NOT_NEGATIVE = (
    "dot_weight",
    "div_weight",
    "softmax_factor",
    "graph_lr",
    "graph_weight_decay",
    "classifier_lr",
    "classifier_weight_decay",
)
_COUNTS = {"num_per_class": 2, "epochs": 1, "steps_per_epoch": 1}
_EDGE_DTYPES = (None, torch.float32, torch.float64, torch.bfloat16)


RATES = ("graph_lr", "graph_weight_decay", "classifier_lr", "classifier_weight_decay")


@dataclass(frozen=True)
class EngineOptions:
    """How the passes of a training step are run; nothing of it changes what is computed, beyond rounding.

    Attributes:
        impl: auto, reference, torch, cpp, cuda or triton (gcahng.dispatch). One asked for by name that is not available
            is an error.
        edge_memory: what the engine saves of the edges: "store" (one D-vector a layer and pair), "hidden" (their 4D
            hidden vectors too), "recompute" (nothing of size n²·D, for more arithmetic), or "auto", by free memory.
        edge_dtype: of stored edges; None: the parameters' own. torch.bfloat16 halves their memory.
        cuda_graph: on CUDA, capture the graph network's passes and replay them: for batches so small that launches
            bound them. Each kind of batch (the last 4) then keeps the memory of its passes. A whole step may be
            captured instead, in a graph of the user's (docs/gpu.md): the optimizers keep their rates on the device.
            With check="deferred" and num_per_class a step then never waits for the device, and end_epoch raises.
        process_group: "world" or a torch.distributed group: its processes hand in the parts of one batch, as large as
            each other, and share the work on its pairs. Every call is then one of all processes, each gets the whole
            batch's loss, and the gradient of its own embeddings is such that DistributedDataParallel's mean over
            processes is that of the whole batch's loss. The loss keeps its weights equal by itself (around it,
            DistributedDataParallel needs find_unused_parameters=True); the first process's state is copied to all
            before the first batch.
    """

    impl: str = "auto"
    edge_memory: str = "auto"
    edge_dtype: torch.dtype | None = None
    cuda_graph: bool = False
    process_group: Any = None


def engine_options(engine: EngineOptions | None, knobs: Mapping[str, Any]) -> EngineOptions:
    """EngineOptions as they were given: whole, or field by field as keywords of GCAHNGLoss.

    Raises:
        TypeError: a keyword is none of its fields, as for any other function.
        UserError: both were given.
    """
    names = [field.name for field in fields(EngineOptions)]
    if unknown := [name for name in knobs if name not in names]:
        raise TypeError(f"GCAHNGLoss() got an unexpected keyword argument {unknown[0]!r}")
    if engine is None:
        return EngineOptions(**knobs)
    if not isinstance(engine, EngineOptions):
        raise UserError(f"engine is a {type(engine).__name__}; it must be an EngineOptions")
    if knobs:
        raise UserError(
            f"engine and {next(iter(knobs))} are given; options of the engine must be given in one of the ways"
        )
    return engine


def plain_numbers(init: Callable[..., None]) -> Callable[..., None]:
    """init, given numpy's scalars as Python's, and with the fields of EngineOptions in its signature.

    `labels.max() + 1` is a number of classes, but a state that holds such a scalar does not load with
    weights_only=True.
    """

    @functools.wraps(init)
    def call(self: Any, *positional: Any, **named: Any) -> None:
        init(self, *map(_plain, positional), **{name: _plain(value) for name, value in named.items()})

    signature = inspect.signature(init)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    of_engine = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(EngineOptions)
    ]
    call.__signature__ = signature.replace(parameters=[*own, *of_engine])  # type: ignore[attr-defined]
    return call


def check_options(given: Mapping[str, Any]) -> None:
    """UserError for the first option of GCAHNGLoss that is not what it must be."""
    for name, allowed in _CHOICES.items():
        if given[name] not in allowed:
            raise UserError(f"{name} is {given[name]!r}; it must be one of {', '.join(allowed)}")
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        value = given[name]
        if not _is_number(value) or value < 0 or (value == 0 and name in _POSITIVE):
            what = "a number above 0" if name in _POSITIVE else "a number of at least 0"
            raise UserError(f"{name} is {value!r}; it must be {what}")
    if not _is_number(given["edge_dropout"]) or not 0 <= given["edge_dropout"] < 1:
        raise UserError(f"edge_dropout is {given['edge_dropout']!r}; it must be at least 0 and under 1")
    for name, least in _COUNTS.items():
        value = given[name]
        if value is not None and (not is_whole(value) or value < least):
            raise UserError(f"{name} is {value!r}; it must be None or a whole number of at least {least}")
    if given["edge_dtype"] not in _EDGE_DTYPES:
        raise UserError(f"edge_dtype is {given['edge_dtype']!r}; it must be None, torch.float32, float64 or bfloat16")
    for name in ("symmetric", "cuda_graph"):
        if not isinstance(given[name], bool):
            raise UserError(f"{name} is {given[name]!r}; it must be True or False")
    if given["cuda_graph"] and given["process_group"] is not None:
        raise UserError("cuda_graph is True and process_group is given; process_group does not support cuda_graph")
    if given["base"] != "npair" and not callable(given["base"]):
        raise UserError(f'base is {given["base"]!r}; it must be "npair" or a module called as base(embeddings, labels)')
    seed = given["seed"]
    if seed is not None and (not is_whole(seed) or not 0 <= seed < 2**63):
        raise UserError(f"seed is {seed!r}; it must be None or a whole number in 0 … 2**63 - 1")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
