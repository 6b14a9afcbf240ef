"""Finds and loads the two native libraries when they are first needed, and remembers why one is missing."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gcahng import installed
from gcahng.errors import UserError

Name = Literal["_C_cpu", "_C_cuda"]
NAMES: tuple[Name, ...] = ("_C_cpu", "_C_cuda")
CPU_ARCHES = ("base", "avx2", "avx512")
TORCH_FLOOR = (2, 10)  # the first with all of the stable ABI that the libraries use
# CUDA's errors that another build or driver mends: the driver is too old, or takes no code that there is for the GPU.
_UNFIT_BUILD = frozenset({35, 98, 200, 209, 218, 222, 223})
_ANSWERS: dict[int, str | None] = {}  # of `unfit_device`, by the number of a GPU


@dataclass(frozen=True)
class Library:
    """A native library that is loaded, or the reason why it is not. Exactly one of the two is None.

    Attributes:
        path: the library's file.
        reason: why there is none, and the remedy, in one line.
    """

    path: Path | None
    reason: str | None


@functools.cache
def load(name: Name) -> Library:
    """Loads a library, which registers its ops. Later calls return the same answer.

    Args:
        name: _C_cpu or _C_cuda.

    Returns:
        The library, or why it is missing: that raises nothing.

    Raises:
        UserError: GCAHNG_CPU_ARCH names an instruction set that is unknown, or that this processor lacks.
    """
    path = installed.FOLDER / f"{name}.so"
    if not path.exists():
        return Library(None, f"{name} was not built ({installed.why_missing(name)})")
    if reason := _unfit_torch(name):
        return Library(None, reason)
    if name == "_C_cuda" and (reason := _old_driver()):
        return Library(None, reason)
    if reason := installed.damage(path):
        return Library(None, f"{path} {reason}; run: {installed.build_command()}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(None, _not_loaded(path, str(error.__cause__ or error)))
    if name == "_C_cpu" and (wanted := os.environ.get("GCAHNG_CPU_ARCH")):
        _set_cpu_arch(path, wanted, "GCAHNG_CPU_ARCH")
    return Library(path, None)


def cpu_arch() -> str | None:
    """The instruction set that the C++ code uses: base, avx2 or avx512. None if the library is missing."""
    library = load("_C_cpu")
    if library.path is None:
        return None
    function = ctypes.CDLL(str(library.path)).gcahng_cpu_arch
    function.restype = ctypes.c_char_p
    return function().decode()


def set_cpu_arch(name: str) -> None:
    """Makes the C++ code use an instruction set, for tests and benchmarks. GCAHNG_CPU_ARCH does so from outside.

    Args:
        name: one of CPU_ARCHES.

    Raises:
        UserError: there is no such instruction set, this processor lacks it, or the library is missing.
    """
    library = load("_C_cpu")
    if library.path is None:
        raise UserError(f"cpu_arch is {name!r}, which cannot be chosen: {library.reason}")
    _set_cpu_arch(library.path, name, "cpu_arch")


def _set_cpu_arch(path: Path, name: str, argument: str) -> None:
    """Asks the library to use an instruction set; `argument` is what named it."""
    function = ctypes.CDLL(str(path)).gcahng_set_cpu_arch
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    status = function(name.encode())
    if status == 1:
        raise UserError(f"{argument} is {name!r}, which this processor lacks; it must be one that it has, such as base")
    if status == 2:
        raise UserError(f"{argument} is {name!r}; it must be one of {', '.join(CPU_ARCHES)}")


def _unfit_torch(name: Name) -> str | None:
    """Why a library cannot run with this torch, or None."""
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version and (int(version[1]), int(version[2])) < TORCH_FLOOR:
        return f"torch is {torch.__version__}; it must be >= 2.10: pip install --upgrade 'torch>=2.10'"
    if name == "_C_cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    return None


def _old_driver() -> str | None:
    """Why NVIDIA's driver cannot run _C_cuda, or None. The CUDA runtime in it needs a driver of its own major version.

    A newer driver will do, and a newer minor version of the runtime, too. Without the check, every launch would fail.
    """
    built = _cuda_of_build()
    if built and 0 < (driver := _driver_cuda()) < built[0] * 1000:
        return (
            f"_C_cuda is built with CUDA {built[0]}.{built[1]}, and NVIDIA's driver knows CUDA up to "
            f"{_written(driver)}; update it, or build with a CUDA {driver // 1000} toolkit: {installed.build_command()}"
        )
    return None


def unfit_device(device: torch.device) -> str | None:
    """Says why the kernels of _C_cuda do not run on a GPU, or None, by one launch when it is first asked for.

    So a library without code for this GPU, or with code that its driver does not take, is noticed before a stage fails.

    Args:
        device: a CUDA device that torch sees.
    """
    if torch.cuda.is_current_stream_capturing():
        return None  # a launch beside it could end the capture; the pass before the capture has asked
    return _probed(torch.cuda.current_device() if device.index is None else device.index)


def _probed(index: int) -> str | None:
    """What `unfit_device` says of a GPU by its number.

    An answer about the build is kept. Another error may pass, such as that a GPU's memory is full.
    """
    if index in _ANSWERS:
        return _ANSWERS[index]
    path = load("_C_cuda").path
    try:
        function = ctypes.CDLL(str(path)).gcahng_cuda_probe
    except AttributeError:
        return f"{path} is older than this gcahng; run: {installed.build_command()}"
    function.argtypes, function.restype = [ctypes.POINTER(ctypes.c_char_p)], ctypes.c_int
    said = ctypes.c_char_p()
    try:
        with torch.cuda.device(index):  # opens no context on the device before
            error = function(ctypes.byref(said))
    except RuntimeError as failure:
        return f"cuda:{index} cannot be used: {str(failure).splitlines()[0]}"
    if error == 0:
        return _ANSWERS.setdefault(index, None)
    have = ".".join(map(str, torch.cuda.get_device_capability(index)))
    failed = (
        f"a first launch on cuda:{index} ({torch.cuda.get_device_name(index)}, compute capability {have}) failed: "
        f"{(said.value or b'').decode()} ({error})"
    )
    if error not in _UNFIT_BUILD:
        return failed
    built, driver = _cuda_of_build(), _driver_cuda()
    architectures = installed.record().get("_C_cuda", {}).get("architectures", "unknown")
    _ANSWERS[index] = (
        f"{failed}. _C_cuda is built with CUDA "
        f"{'.'.join(map(str, built)) if built else 'unknown'} for {architectures}, torch with CUDA "
        f"{torch.version.cuda}, and NVIDIA's driver knows CUDA up to {_written(driver) if driver else 'unknown'}; "
        f"build it on this machine: {installed.build_command()}"
    )
    return _ANSWERS[index]


def _cuda_of_build() -> tuple[int, int] | None:
    """The CUDA that _C_cuda was built with, if its build says so."""
    version = re.match(r"(\d+)\.(\d+)", installed.record().get("_C_cuda", {}).get("cuda", ""))
    return (int(version[1]), int(version[2])) if version else None


def _written(version: int) -> str:
    """A version of CUDA as it is written: 13.2 for 13020."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _driver_cuda() -> int:
    """The newest CUDA that the driver knows, 13020 for 13.2; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def _not_loaded(path: Path, said: str) -> str:
    """What the loader said about a library, in one line, and the remedy."""
    said = " ".join(said.removeprefix(f"{path}: ").split())
    if re.search(r"undefined symbol: (aoti_)?torch_", said):
        remedy = f"torch {torch.__version__} lacks this function; install an official build of torch >= 2.10"
    else:
        remedy = f"run: {installed.build_command()}"
    return f"{path} does not load ({said}); {remedy}"
