"""Compiles tests/emulator/<stem>.cpp, which holds the kernels of csrc/cuda/<stem>.cu, and calls it on torch tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of csrc/common/dtype.h
FENCE = 64  # values before and after a guarded tensor that nothing may write


_SCRATCH = tempfile.TemporaryDirectory(prefix="gcahng-emulator-")  # before threads ask for it


@functools.cache
def compiled(stem: str, *defines: str) -> ctypes.CDLL:
    """The stem's kernels as a host library. A compiler that is missing or fails is an error."""
    library = Path(_SCRATCH.name) / ("-".join((stem, *defines)) + ".so")
    options = ["-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command = [os.environ.get("CXX", "c++"), *options, *(f"-D{name}" for name in defines)]
    done = subprocess.run([*command, str(FOLDER / f"{stem}.cpp"), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def launch(
    library: ctypes.CDLL, function: str, seed: int, *arguments: Tensor | torch.dtype | int | float | None
) -> None:
    """Runs a launcher on the seed and these arguments: tensors as pointers (None: null), dtypes as csrc/common/dtype.h
    counts them, whole numbers in 64 bits, others as doubles. RuntimeError for what it reports."""
    assert all(a.is_contiguous() for a in arguments if isinstance(a, Tensor))

    def passed(argument: Tensor | torch.dtype | int | float | None) -> ctypes._SimpleCData:
        if isinstance(argument, torch.dtype):
            return ctypes.c_int(DTYPES.index(argument))
        if isinstance(argument, int):
            return ctypes.c_int64(argument)
        if isinstance(argument, float):
            return ctypes.c_double(argument)
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())

    entry = getattr(library, function)
    entry.restype = ctypes.c_char_p
    message = entry(ctypes.c_int(seed), *map(passed, arguments))
    if message is not None:
        raise RuntimeError(message.decode())


def call(library: ctypes.CDLL, function: str, seed: int, *arguments: Tensor | int) -> None:
    """launch, for a launcher of one dtype that comes first."""
    dtype = next(a.dtype for a in arguments if isinstance(a, Tensor))
    assert all(a.dtype == dtype for a in arguments if isinstance(a, Tensor))
    launch(library, function, seed, dtype, *arguments)


class Guarded:
    """A NaN-filled tensor between two fences of NaN: a read past its end shows in the result, a write in `check`."""

    def __init__(self, *shape: int, dtype: torch.dtype, offset: int = 0) -> None:
        """offset moves the tensor by so many values, to an address that may not be aligned to 16 bytes."""
        count = int(torch.tensor(shape).prod())
        self._start = FENCE + offset
        self._memory = torch.full((count + 2 * FENCE + offset,), torch.nan, dtype=dtype)
        self.tensor = self._memory[self._start : self._start + count].view(shape)

    @classmethod
    def of(cls, values: Tensor, offset: int = 0) -> Tensor:
        """A guarded copy."""
        guarded = cls(*values.shape, dtype=values.dtype, offset=offset)
        return guarded.tensor.copy_(values.detach())

    def check(self) -> Tensor:
        """The tensor, once nothing but it was written."""
        count = self.tensor.numel()
        for fence in (self._memory[: self._start], self._memory[self._start + count :]):
            assert bool(fence.isnan().all()), "a kernel wrote outside its output"
        return self.tensor
