"""Compiles tests/emulator/<stem>.cpp, which holds the kernels of csrc/cuda/<stem>.cu, and guards their tensors."""

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
FENCE = 64  # values before and after a guarded tensor that nothing may write


_SCRATCH = tempfile.TemporaryDirectory(prefix="gcahng-emulator-")  # before threads ask for it


@functools.cache
def compiled(stem: str, *flags: str) -> ctypes.CDLL:
    """The stem's kernels as a host library, compiled with these further flags.

    A compiler that is missing or fails is an error.
    """
    library = Path(_SCRATCH.name) / ("".join((stem, *flags)) + ".so")
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command = [os.environ.get("CXX", "c++"), *options, *flags]
    done = subprocess.run([*command, str(FOLDER / f"{stem}.cpp"), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


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
