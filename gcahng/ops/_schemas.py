"""The ops' schemas and fakes. They stand here, so that they exist without a native library; C++ only implements them.

Every op exists in two namespaces: `gcahng`, which the native libraries implement (C++ on the CPU, CUDA C++ on CUDA
devices), and `gcahng_triton`, which runs the Triton kernels of `gcahng.kernels`. They are bare forwards and backwards
without autograd; an autograd Function in gcahng/ops/<stem>.py joins them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NATIVE, TRITON = "gcahng", "gcahng_triton"
_LIBRARIES = {namespace: torch.library.Library(namespace, "DEF") for namespace in (NATIVE, TRITON)}


def library(namespace: str) -> torch.library.Library:
    """The library object that owns a namespace's definitions."""
    return _LIBRARIES[namespace]


def define(name: str, schema: str, fake: Callable[..., Any], launcher: str) -> None:
    """Declares an op in both namespaces. launcher: "<stem>.<function>", which gcahng/kernels/<stem>.py has."""
    stem, function = launcher.split(".")

    def run_triton(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"gcahng.kernels.{stem}"), function)(*arguments)

    for namespace, library in _LIBRARIES.items():
        library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    for key in ("CUDA", "CPU"):  # on the CPU under TRITON_INTERPRET=1
        _LIBRARIES[TRITON].impl(name, run_triton, key)


def registered(name: str) -> dict[str, Callable[..., Any]]:
    """The op of this name for each implementation that is a registered op."""
    native, triton = (getattr(getattr(torch.ops, namespace), name).default for namespace in (NATIVE, TRITON))
    return {"cpp": native, "cuda": native, "triton": triton}


def _edge_start_fwd(x_i: Tensor, x_j: Tensor) -> Tensor:
    return x_i.new_empty(x_i.shape[0], x_j.shape[0], x_i.shape[1])


def _edge_start_bwd(grad_e: Tensor, x_i: Tensor, x_j: Tensor) -> tuple[Tensor, Tensor]:
    return x_i.new_empty(x_i.shape), x_j.new_empty(x_j.shape)


define("edge_start_fwd", "(Tensor x_i, Tensor x_j) -> Tensor", _edge_start_fwd, "edge_start.forward")
define(
    "edge_start_bwd",
    "(Tensor grad_e, Tensor x_i, Tensor x_j) -> (Tensor, Tensor)",
    _edge_start_bwd,
    "edge_start.backward",
)
