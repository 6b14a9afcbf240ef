"""What GCAHNGLoss accepts as options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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


def python_numbers(init: Callable[..., None]) -> Callable[..., None]:
    """init, given numpy's scalars as Python's: `labels.max() + 1` is a number of classes, but a state that holds such
    a scalar does not load with weights_only=True."""

    @functools.wraps(init)
    def call(self: Any, *positional: Any, **named: Any) -> None:
        init(self, *map(_plain, positional), **{name: _plain(value) for name, value in named.items()})

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
        raise UserError("cuda_graph is True and process_group is given; a captured pass does not speak to others")
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
