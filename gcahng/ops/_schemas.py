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
