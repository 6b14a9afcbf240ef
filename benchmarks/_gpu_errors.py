"""What may go wrong with one case of a measurement while the others continue."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Doing = Callable[[str], None]  # called with the case that is worked on next
OUT_OF_MEMORY = "out of memory"
# After these a CUDA context is of no further use.
_FATAL = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure")


class Fatal(Exception):
    """The device's context is lost, so a new process has to continue."""


@contextmanager
def kept(failed: dict[str, str], name: str, doing: Doing) -> Iterator[None]:
    """A context that catches what goes wrong with a case, and notes the reason under the case's name.

    Raises:
        Fatal: nothing can be measured after this error.
    """
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
    """Give unused memory back, including the engine's workspace."""
    from gcahng.engine import prepare

    prepare._workspace.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    lines: list[Any] = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
