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
