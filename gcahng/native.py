"""Finds and loads the two native libraries, when they are first needed, and remembers why one is not there."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gcahng.errors import UserError

Name = Literal["_C_cpu", "_C_cuda"]
NAMES: tuple[Name, ...] = ("_C_cpu", "_C_cuda")
CPU_ARCHES = ("base", "avx2", "avx512")
FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Library:
    """path of a loaded library, or the reason (and remedy) why there is none: exactly one of them is None."""

    path: Path | None
    reason: str | None


@functools.cache
def load(name: Name) -> Library:
    """Loads a library once and for all; its ops are registered then. Never raises for a library that is not there."""
    path = FOLDER / f"{name}.so"
    if not path.exists():
        return Library(None, f"{name} was not built ({_why_not_built(name)})")
    if name == "_C_cuda" and torch.version.cuda is None:
        return Library(None, f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        first_line = str(error).splitlines()[0]
        return Library(None, f"{path} does not load ({first_line}); install gcahng again beside this torch")
    if name == "_C_cpu" and (wanted := os.environ.get("GCAHNG_CPU_ARCH")):
        _set_cpu_arch(path, wanted, "GCAHNG_CPU_ARCH")
    return Library(path, None)


def cpu_arch() -> str | None:
    """The instruction set that the C++ code uses: base, avx2 or avx512; None without the library."""
    library = load("_C_cpu")
    if library.path is None:
        return None
    function = ctypes.CDLL(str(library.path)).gcahng_cpu_arch
    function.restype = ctypes.c_char_p
    return function().decode()


def set_cpu_arch(name: str) -> None:
    """Makes the C++ code use this instruction set, for tests and benchmarks; GCAHNG_CPU_ARCH does so from outside.

    Errors: UserError for a name that is not in CPU_ARCHES, for one that this processor lacks, and without the library.
    """
    library = load("_C_cpu")
    if library.path is None:
        raise UserError(f"cpu_arch={name!r} cannot be chosen: {library.reason}")
    _set_cpu_arch(library.path, name, "cpu_arch")


def _set_cpu_arch(path: Path, name: str, argument: str) -> None:
    function = ctypes.CDLL(str(path)).gcahng_set_cpu_arch
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    status = function(name.encode())
    if status == 1:
        raise UserError(f"{argument}={name!r}: this processor does not have it; use base")
    if status == 2:
        raise UserError(f"{argument}={name!r}: choose one of {', '.join(CPU_ARCHES)}")


def _why_not_built(name: Name) -> str:
    try:
        reason = json.loads((FOLDER / "_native_build.json").read_text()).get(name)
    except FileNotFoundError:
        return "run `pip install .`, or `python setup.py build_ext --inplace` in a source folder"
    return (
        f"at build time: {reason}" if reason else "the file was there after the build and is gone; install gcahng again"
    )
