"""Many strings in little memory, which worker processes share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import torch
from torch import Tensor

# How many strings are taken at a time, so that what that needs for itself stays small.
_AT_ONCE = 1 << 14


class Strings(Sequence[str]):
    """A sequence of strings, stored as one tensor of bytes and one of places.

    A million strings of Python are a million objects, which a worker process copies: all at once where it is started
    anew, or one by one where it was forked, because a look at an object changes its count of references. Tensors are
    shared in both cases.

    Args:
        texts: the strings; those that hold bytes which are no text (surrogates) come back as they are.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, texts: Iterable[str] = ()) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        self._bytes = torch.from_numpy(np.frombuffer(bytearray(b"".join(encoded)), np.uint8))
        self._ends = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int64))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        place = range(len(self))[index]  # counts from the end, and raises IndexError
        start, end = self._ends[place : place + 2].tolist()
        return self._bytes[start:end].numpy().tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _AT_ONCE):
            ends = self._ends[first : first + _AT_ONCE + 1]
            content = self._bytes[ends[0] : ends[-1]].numpy().tobytes()
            ends = (ends - ends[0]).tolist()
            for start, end in zip(ends[:-1], ends[1:], strict=True):
                yield content[start:end].decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Strings):
            return torch.equal(self._ends, other._ends) and torch.equal(self._bytes, other._bytes)
        if isinstance(other, Sequence) and not isinstance(other, str | bytes):
            return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))
        return NotImplemented

    def __repr__(self) -> str:
        more = f", … {len(self):,} in all" if len(self) > 3 else ""
        return f"Strings({', '.join(map(repr, self[:3]))}{more})"

    @property
    def nbytes(self) -> int:
        """The memory that the strings take, in bytes."""
        return self._bytes.nbytes + self._ends.nbytes

    def take(self, indices: Tensor) -> Strings:
        """The strings at `indices` (k,) int64, in this order."""
        starts, lengths = self._ends[:-1][indices], self._ends.diff()[indices]
        taken = Strings()
        taken._ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        taken._bytes = torch.empty(int(taken._ends[-1]), dtype=torch.uint8)
        for first in range(0, len(indices), _AT_ONCE):
            rows = slice(first, min(first + _AT_ONCE, len(indices)))
            low, high = int(taken._ends[rows.start]), int(taken._ends[rows.stop])
            shift = (starts[rows] - taken._ends[:-1][rows]).repeat_interleave(lengths[rows])
            taken._bytes[low:high] = self._bytes[torch.arange(low, high) + shift]
        return taken
