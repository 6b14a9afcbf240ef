"""Tile-sized memory that is used again from tile to tile and from step to step.

New memory would cost more time in page faults than the arithmetic on it.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_VIEWS = 16  # views of a buffer: those of a few shapes of tiles, for the last few kinds of batches


class _Slot(NamedTuple):
    """A buffer and its views. A new view takes some microseconds, so that they are cached.

    Attributes:
        buffer: the memory.
        views: views of its beginning, by their shape.
    """

    buffer: Tensor
    views: dict[tuple[int, int], Tensor]


class Workspace:
    """Buffers by name, which grow as needed."""

    def __init__(self) -> None:
        self._slots: dict[tuple[str, torch.dtype, torch.device], _Slot] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def follow(self, device: torch.device) -> None:
        """On CUDA, makes work that is queued from now on wait for work that used these buffers on another stream."""
        if device.type != "cuda":
            return
        now = torch.cuda.current_stream(device)
        before = self._streams.setdefault(device, now)
        if before != now:
            now.wait_stream(before)
            for slot in self._slots.values():
                if slot.buffer.device == device:
                    slot.buffer.record_stream(now)
            self._streams[device] = now

    def get(self, name: str, rows: int, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory (rows, width) whose contents are undefined.

        Args:
            name: of the buffer. The same name gets the same memory until more is asked for.
            rows: first dimension.
            width: second dimension.
            like: a tensor on the same device.
            dtype: by default that of `like`.
        """
        dtype = dtype or like.dtype
        slot = self._slots.get((name, dtype, like.device))
        view = None if slot is None else slot.views.get((rows, width))
        return self._make(name, rows, width, dtype, like.device) if view is None else view

    def clear(self) -> None:
        """Gives all memory back."""
        self._slots.clear()

    # The next batch may train, and an inference tensor stays one.
    @torch.inference_mode(False)
    def _make(self, name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        slot = self._slots.get((name, dtype, device))
        if slot is None or slot.buffer.numel() < rows * width:
            slot = _Slot(torch.empty(rows * width, dtype=dtype, device=device), {})
            self._slots[name, dtype, device] = slot
        elif len(slot.views) >= _MOST_VIEWS:
            slot.views.clear()
        view = slot.views[rows, width] = slot.buffer[: rows * width].view(rows, width)
        return view


class WorkspaceOfThread(threading.local, Workspace):
    """A workspace with separate buffers for each thread, since passes that run at once must not share memory."""
