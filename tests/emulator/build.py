"""Compiles tests/emulator/<stem>.cpp, which holds the kernels of csrc/cuda/<stem>.cu, and guards their tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from pathlib import Path

import torch
from shared_files import made_once
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
FENCE = 64  # values before and after a guarded tensor that nothing may write


@functools.cache
def compiled(stem: str) -> ctypes.CDLL:
    """The stem's kernels as a host library. A compiler that is missing or fails is an error."""
    return ctypes.CDLL(str(made_once(f"emulator-{stem}.so", functools.partial(_compile, stem))))


def _compile(stem: str, library: Path) -> None:
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command = [os.environ.get("CXX", "c++"), *options, str(FOLDER / f"{stem}.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
