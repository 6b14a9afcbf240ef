"""Where a run computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gcahng.errors import UserError


def resolve_device(name: str) -> torch.device:
    """The device that `name` means: auto (cuda where there is one), cpu, cuda or cuda:N.

    Raises:
        UserError: another name, or a CUDA device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {name!r}; PyTorch finds {torch.cuda.device_count()} CUDA devices here; use cpu")
    return device


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch's CPU threads, set for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
