"""Tile-sized memory that is used again from tile to tile and from step to step: page faults cost more than the
arithmetic."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Workspace:
    """Buffers by name, grown as needed."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def follow(self, device: torch.device) -> None:
        """On CUDA: work that is queued from now on waits for what used these buffers on another stream."""
        if device.type != "cuda":
            return
        now = torch.cuda.current_stream(device)
        before = self._streams.setdefault(device, now)
        if before != now:
            now.wait_stream(before)
            for buffer in self._buffers.values():
                if buffer.device == device:
                    buffer.record_stream(now)
            self._streams[device] = now

    def get(self, name: str, rows: int, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(rows, width), contents undefined; the same memory for the same name until more is asked for."""
        dtype = dtype or like.dtype
        key = f"{name}:{dtype}:{like.device}"
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < rows * width:
            buffer = self._buffers[key] = torch.empty(rows * width, dtype=dtype, device=like.device)
        return buffer[: rows * width].view(rows, width)


class WorkspaceOfThread(threading.local, Workspace):
    """A workspace that each thread sees with buffers of its own: passes that run at once must not share memory."""
