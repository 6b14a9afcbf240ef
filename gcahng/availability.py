"""Says whether an implementation can run on a device, and if not why, with the remedy.

gcahng.dispatch asks before it decides. Triton counts as available only where it can compile.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch

from gcahng import native

OLDEST = (8, 0)  # the oldest compute capability that CMakeLists.txt builds for; the first with bf16 products


def available(impl: str, device: torch.device | str, compute: torch.dtype | None = None) -> str | None:
    """Says whether an implementation can run on a device.

    Args:
        impl: reference, torch, cpp, cuda or triton.
        device: the device of the tensors.
        compute: dtype of products, or None if it is not known.

    Returns:
        None if it can run, else the reason and the remedy, in one line.
    """
    device = torch.device(device)
    if impl == "cpp":
        return native.load("_C_cpu").reason if device.type == "cpu" else "it runs on CPU tensors alone"
    if impl == "triton" and device.type == "cpu":
        return _interpreter_missing(compute)
    if impl in ("cuda", "triton"):
        if device.type != "cuda":
            return "it runs on CUDA tensors alone"
        if reason := native.load("_C_cuda").reason if impl == "cuda" else _compiler_missing():
            return reason
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if impl not in ("cuda", "triton"):
        return None
    return _too_old(device) or (native.unfit_device(device) if impl == "cuda" else None)


def _too_old(device: torch.device) -> str | None:
    """Why a GPU is too old, or None."""
    have = torch.cuda.get_device_capability(device)
    if have >= OLDEST:
        return None
    return f"it needs a GPU of compute capability {_version(OLDEST)} or newer, and this one has {_version(have)}"


def _version(numbers: tuple[int, int]) -> str:
    """A version as it is written, such as "8.0"."""
    return ".".join(map(str, numbers))


def _triton_missing() -> str | None:
    """Why triton cannot be imported, or None."""
    return None if importlib.util.find_spec("triton") else 'triton is not installed; pip install "gcahng[triton]"'


def _interpreter_missing(compute: torch.dtype | None) -> str | None:
    """Why Triton's interpreter cannot run, or None."""
    if reason := _triton_missing():
        return reason
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on CUDA tensors; only TRITON_INTERPRET=1, for tests, interprets the kernels on the CPU"
    if reason := interpreter_fails(importlib.metadata.version("triton"), np.__version__):
        return reason
    if compute == torch.bfloat16 and not _interprets_bfloat16():
        remedy = "call gcahng.testing.interpreter.interpret_bfloat16() first"
        return f"Triton's interpreter computes bfloat16 wrongly as it comes; {remedy}"
    return None


def _interprets_bfloat16() -> bool:
    """Whether gcahng.testing.interpreter has put Triton's interpreter right."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    return interpreter is not None and getattr(interpreter.InterpreterBuilder, "rounds_bfloat16", False)


def interpreter_fails(triton: str, numpy: str) -> str | None:
    """Why Triton's interpreter fails with these versions, or None. It converts arrays that numpy 2.4 no longer does."""

    def older(version: str, than: tuple[int, int]) -> bool:
        return tuple(map(int, version.split(".")[:2])) < than

    if older(triton, (3, 7)) and not older(numpy, (2, 4)):
        return f"the interpreter of Triton {triton} fails with numpy {numpy}; install triton >= 3.7, or numpy < 2.4"
    return None


def _compiler_missing() -> str | None:
    """Why Triton cannot compile, or None. Triton itself would only say so when a kernel is first launched."""
    return _triton_missing() or _no_c_compiler() or _no_cache_folder()


@cache
def _no_c_compiler() -> str | None:
    """That there is no C compiler, or None."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]  # what Triton looks for
    if any(shutil.which(name) for name in names):
        return None
    return f"Triton needs a C compiler to launch kernels, and there is no {' or '.join(names)}; install one, or set CC"


@cache
def _no_cache_folder() -> str | None:
    """That Triton's cache cannot be written, or None."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")  # Path.home() raises where there is none
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton").absolute()
    existing = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if existing is not None and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return None
    return f"Triton keeps compiled kernels in {folder}, which cannot be written to; set TRITON_CACHE_DIR to a folder"
