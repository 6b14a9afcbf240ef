"""Tile-sized memory that is used again from tile to tile and from step to step.

New memory would cost more time in page faults than the arithmetic on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_Made = TypeVar("_Made", bound=tuple)
_MOST_CONSTANTS = 8  # such as index tensors, for the last few kinds of batches
_MOST_VIEWS = 16  # views of a buffer: those of a few shapes of tiles, for the last few kinds of batches


class _Slot(NamedTuple):
    """A buffer and its views. A new view takes some microseconds, so that they are cached.

    Attributes:
        buffer: the memory.
        views: views of its beginning, by their shape.
        others: what `views` made of such views, by the same shapes.
    """

    buffer: Tensor
    views: dict[tuple[int, int], Tensor]
    others: dict[tuple[int, ...], tuple[Tensor, ...]]


class _Flipped(NamedTuple):
    """A view of a buffer and its transpose."""

    view: Tensor
    transpose: Tensor


class Workspace:
    """Buffers by name, which grow as needed."""

    def __init__(self) -> None:
        self._slots: dict[tuple[str, torch.dtype, torch.device], _Slot] = {}
        self._flipped: dict[int, _Flipped] = {}  # by the views' ids
        self._constants: dict[Hashable, tuple[Tensor, ...]] = {}
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
            for constant in (x for constants in self._constants.values() for x in constants):
                if constant.device == device:
                    constant.record_stream(now)
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

    # The next batch may train, and an inference tensor stays one.
    @torch.inference_mode(False)
    def views(
        self, name: str, sizes: tuple[int, ...], whole: Tensor, make: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Views of what `get` returned, which are made once.

        Args:
            name: the buffer's.
            sizes: everything beside the shape of `whole` that the views depend on.
            whole: what `get` returned for this name.
            make: makes the views of it.
        """
        slot = self._slots.get((name, whole.dtype, whole.device))
        if slot is None or slot.views.get(tuple(whole.shape)) is not whole:
            return make(whole)
        key = (*whole.shape, *sizes)
        found = slot.others.get(key)
        if found is None:
            found = slot.others[key] = make(whole)
        return found

    def transposed(self, x: Tensor) -> Tensor | None:
        """The transpose of what `get` returned, which is made once; None for any other tensor."""
        found = self._flipped.get(id(x))
        return found.transpose if found is not None and found.view is x else None

    # The next batch may train, and an inference tensor stays one.
    @torch.inference_mode(False)
    def constant(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """Tensors that follow from the sizes of a batch alone. They are kept for the next batch like it.

        Args:
            key: what they follow from.
            make: makes them.
        """
        found = self._constants.pop(key, None)
        if found is None:
            found = make()
            while len(self._constants) >= _MOST_CONSTANTS:
                del self._constants[next(iter(self._constants))]
        self._constants[key] = found  # the last one used stands last
        return found

    def clear(self) -> None:
        """Gives all memory back."""
        self._constants.clear()
        self._slots.clear()
        self._flipped.clear()

    # The next batch may train, and an inference tensor stays one.
    @torch.inference_mode(False)
    def _make(self, name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        slot = self._slots.get((name, dtype, device))
        if slot is None or slot.buffer.numel() < rows * width:
            self._forget_views(slot)
            slot = _Slot(torch.empty(rows * width, dtype=dtype, device=device), {}, {})
            self._slots[name, dtype, device] = slot
        elif len(slot.views) >= _MOST_VIEWS:
            self._forget_views(slot)
        view = slot.views[rows, width] = slot.buffer[: rows * width].view(rows, width)
        self._flipped[id(view)] = _Flipped(view, view.T)
        return view

    def _forget_views(self, slot: _Slot | None) -> None:
        """Drops the views of a slot."""
        if slot is not None:
            for view in slot.views.values():
                self._flipped.pop(id(view), None)
            slot.views.clear()
            slot.others.clear()


class WorkspaceOfThread(threading.local, Workspace):
    """A workspace with separate buffers for each thread, since passes that run at once must not share memory."""
