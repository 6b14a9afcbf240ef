"""What may go wrong with one case of a measurement while the others go on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Doing = Callable[[str], None]  # told which case is being worked on, before it is
OUT_OF_MEMORY = "out of memory"
# After these a CUDA context is of no further use.
_FATAL = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure")


class Fatal(Exception):
    """The device's context is lost: a new process has to go on."""


@contextmanager
def kept(failed: dict[str, str], name: str, doing: Doing) -> Iterator[None]:
    """Notes under the case's name why it failed, if it does. Fatal where nothing can be measured after it."""
    doing(name)
    try:
        yield
    except torch.OutOfMemoryError:
        failed[name] = OUT_OF_MEMORY
    except Exception as error:  # a kernel that does not compile, for one, must not take the others along
        text = one_line(error)
        if any(mark in str(error) for mark in _FATAL) and "out of memory" not in str(error):
            raise Fatal(text) from error
        failed[name] = OUT_OF_MEMORY if "out of memory" in str(error) else text
    if name in failed:
        release()


def release() -> None:
    """Gives unused memory back, the engine's workspace included."""
    from gcahng.engine import operators

    operators._workspace.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    lines: list[Any] = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
