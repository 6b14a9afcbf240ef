"""Decides which code runs, for the loss and for the public ops. Nothing else decides it.

    reference   plain PyTorch, differentiated by autograd; it defines what is meant
    torch       the engine, with its stages in PyTorch, on any device
    cpp         the engine, with its stages in C++ on the CPU (_C_cpu)
    cuda        the engine, with its stages in CUDA C++ (_C_cuda)
    triton      the engine, with its stages and the edge MLP's products in Triton (gcahng.kernels)

An implementation that is asked for by name runs, or is an error. "auto" takes the first of a list that is available for
the tensors at hand (see gcahng.availability). The environment variable GCAHNG_AUTO puts another implementation first in
the list for CUDA, if measurements on a GPU speak for it:

    GCAHNG_AUTO=triton                              # in the place of cuda+triton
    GCAHNG_AUTO=cuda+triton,mix_fwd_=triton         # with another implementation of single ops (gcahng/engine/stages)

`python benchmarks/gpu.py` prints the setting that its measurements speak for.
"""

from __future__ import annotations

import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch

from gcahng.availability import available
from gcahng.engine.engine import Engine, PassOptions
from gcahng.engine.precision import compute_dtype
from gcahng.engine.schema import OPS
from gcahng.engine.stages import split
from gcahng.errors import UserError
from gcahng.reference import training_step as reference
from gcahng.reference.training_step import Batch

NAMES = ("reference", "torch", "cpp", "cuda", "triton")
WHATS = ("loss", "edge_update", "channel_mix")
"""What is dispatched."""

# What "auto" tries, best first. "cuda+triton" is CUDA C++ for what is row-wise, and Triton for the edge MLP, whose
# products are fused with what surrounds them. On the CPU Triton is an interpreter for tests, so that it comes last.
ORDER = {
    "cpu": ("cpp", "torch", "reference", "triton"),
    "cuda": ("cuda+triton", "cuda", "triton", "torch", "reference"),
}
ELSEWHERE = ("torch", "reference")  # the same on other devices

MOST_VIEWS = 64  # samples of a class that fused stages take at most (csrc/bindings/common.h)
MOST_CHANNELS = 1024  # that stages in CUDA C++ take at most (csrc/cuda/rows.cuh)

AUTO = "GCAHNG_AUTO"
AUTO_BASES = ("cuda+triton", "cuda", "triton", "torch")

_log = logging.getLogger("gcahng")
_said: set[tuple[str, str, str]] = set()


class Sizes(NamedTuple):
    """The properties of a call that decide which code can run. What is not known is None.

    Attributes:
        views: samples of a class, K.
        dim: channels D.
        compute: dtype of products.
    """

    views: int | None = None
    dim: int | None = None
    compute: torch.dtype | None = None


class Choice(NamedTuple):
    """Which code runs, and why no better one does.

    Attributes:
        implementation: reference, torch, cpp, cuda, triton or cuda+triton. GCAHNG_AUTO may append ",OP=IMPL…" on CUDA.
        passed: for each better implementation "NAME: reason".
    """

    implementation: str
    passed: tuple[str, ...] = ()


def choose(impl: str, device: torch.device | str, sizes: Sizes = Sizes(), what: str = "loss") -> Choice:  # noqa: B008
    """Decides which code runs.

    Args:
        impl: "auto" or one of NAMES.
        device: the device of the tensors.
        sizes: of the call.
        what: one of WHATS, for messages.

    Raises:
        UserError: impl is no such name, or it was asked for by name and is not available; or GCAHNG_AUTO is wrong.
    """
    device = torch.device(device)
    if impl == "auto":
        passed: list[str] = []
        for name in _candidates(device):
            reason = _unavailable(name, device, sizes)
            if reason is None:
                return Choice(name, tuple(passed))
            passed.append(f"{name}: {reason}")
        raise UserError(f"{what} runs nowhere on {device}: {'; '.join(passed)}")
    if impl not in NAMES:
        raise UserError(f"impl is {impl!r}; it must be one of auto, {', '.join(NAMES)}")
    if reason := _unavailable(impl, device, sizes):
        raise UserError(f"impl is {impl!r}, which is not available for {what} on {device.type}: {reason}")
    return Choice(impl)


def passes(impl: str, batch: Batch, options: PassOptions) -> Engine | ModuleType:
    """Decides which code runs the passes of a training step: metric_pass, generator_pass and generate.

    Args:
        impl: "auto" or one of NAMES.
        batch: what they run on.
        options: how the engine runs them.

    Returns:
        The engine with one of its implementations, or the module gcahng.reference.training_step.

    Raises:
        UserError: as of `choose`; or passes are to be captured as CUDA graphs and cannot be.
    """
    device, captures = batch.z.device, options.graphs is not None
    if captures and device.type != "cuda":
        raise UserError(f"cuda_graph is True and the embeddings are on {device}; CUDA graphs need a CUDA device")
    compute = compute_dtype(device, batch.z.dtype)
    implementation = chosen("loss", impl, device, batch.views, batch.z.shape[1], compute)
    if implementation != "reference":
        return Engine(implementation, options)
    if captures:
        raise UserError("cuda_graph is True and impl is 'reference'; the engine alone captures its passes")
    return reference


def chosen(what: str, impl: str, device: torch.device, views: int | None, dim: int, compute: torch.dtype | None) -> str:
    """Decides, as `choose` does, for a call that is about to run.

    What "auto" chose is logged once. torch.compile takes the answer as a constant instead of tracing into the search.

    Args:
        what: one of WHATS.
        impl: "auto" or one of NAMES.
        device: the device of the tensors.
        views: samples of a class, K, or None.
        dim: channels D.
        compute: dtype of products.

    Returns:
        The implementation (see Choice).
    """
    choice = choose(impl, device, Sizes(views, dim, compute), what)
    if impl == "auto":
        _say_once(what, device.type, choice)
    return choice.implementation


# The same mark as torch.compiler.assume_constant_result sets, which would import the whole compiler.
chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _candidates(device: torch.device) -> tuple[str, ...]:
    """What "auto" tries on a device, best first."""
    order = ORDER.get(device.type, ELSEWHERE)
    if device.type != "cuda" or (asked := auto_asks()) is None:
        return order
    _check_asked(asked, device)
    return (asked, *order)


def _say_once(what: str, device_type: str, choice: Choice) -> None:
    """Logs a choice the first time it is made, as a warning if something better does not run."""
    key = (what, device_type, choice.implementation)
    if key not in _said:
        _said.add(key)
        reasons = "".join(f"; not {reason}" for reason in choice.passed)
        level = logging.WARNING if choice.passed else logging.INFO
        _log.log(level, f"{what} on {device_type} uses impl={choice.implementation!r}{reasons}")


def _unavailable(implementation: str, device: torch.device, sizes: Sizes) -> str | None:
    """Says what `available` says, for all parts of an implementation and for the sizes of a call."""
    parts = _parts(implementation)
    for part in parts:
        if reason := available(part, device, sizes.compute):
            return reason if part == implementation else f"{part} is not available ({reason})"
    if implementation in ("reference", "torch"):
        return None
    if sizes.views is not None and sizes.views > MOST_VIEWS:
        return f"it takes up to {MOST_VIEWS} samples a class, not {sizes.views}; impl='torch' takes any number"
    if "cuda" in parts and sizes.dim is not None and sizes.dim > MOST_CHANNELS:
        return f"it takes up to {MOST_CHANNELS} channels, not {sizes.dim}; impl='torch' takes any number"
    return None


def _parts(implementation: str) -> list[str]:
    """The implementations that the stages and single ops of this one come from, each once."""
    base, routes = split(implementation)
    return list(dict.fromkeys([*base.split("+"), *routes.values()]))


# -- GCAHNG_AUTO


def auto_asks() -> str | None:
    """What GCAHNG_AUTO asks for, or None if it is not set.

    Raises:
        UserError: its value is wrong.
    """
    text = os.environ.get(AUTO, "").replace(" ", "")
    if not text:
        return None
    base, routes = split(text)
    if base not in AUTO_BASES:
        raise UserError(f"{AUTO} is {text}; it must begin with one of {', '.join(AUTO_BASES)}")
    for op, impl in routes.items():
        if op not in OPS or impl not in ("cuda", "triton") or base == "torch":
            raise UserError(
                f"{AUTO} is {text}; after cuda+triton, cuda or triton each part must be OP=cuda or OP=triton, with "
                f"OP one of {', '.join(OPS)}"
            )
    return text


def _check_asked(asked: str, device: torch.device) -> None:
    """Refuses what GCAHNG_AUTO asks for where a part of it is not available."""
    for part in _parts(asked):
        if reason := available(part, device):
            raise UserError(f"{AUTO} is {asked} and {part} is not available on {device.type}: {reason}")
