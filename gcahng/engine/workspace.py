"""Tile-sized memory that is used again from tile to tile and from step to step: page faults cost more than the
arithmetic."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_VIEWS = 16  # of a buffer: a few shapes of tiles, of the last few kinds of batches


class _Slot(NamedTuple):
    """A buffer, and by shape the views of it that were asked for: making one anew takes some microseconds each time."""

    buffer: Tensor
    views: dict[tuple[int, int], Tensor]


class Workspace:
    """Buffers by name, grown as needed."""

    def __init__(self) -> None:
        self._slots: dict[tuple[str, torch.dtype, torch.device], _Slot] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def follow(self, device: torch.device) -> None:
        """On CUDA: work that is queued from now on waits for what used these buffers on another stream."""
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
        """(rows, width), contents undefined; the same memory for the same name until more is asked for."""
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
    """A workspace that each thread sees with buffers of its own: passes that run at once must not share memory."""
