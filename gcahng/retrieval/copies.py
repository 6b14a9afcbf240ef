"""Rows of an index that are the same, bit for bit, such as those of one placeholder image in a gallery.

Each is stored once. Two thousand copies of a row would cut a graph of neighbors off from the rest ("hnsw" then misses
a tenth of the other neighbors), and rounding and chance would order them. Where a search finds a stored row, it gives
all its copies, in the order in which they were added.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

_MAGIC = b"GCAHNGCP"
_LENGTHS = struct.Struct("<QQ")
_DIGEST = 16


class Group(NamedTuple):
    """Rows that are the same.

    Attributes:
        row: the first of them.
        size: how many there are.
    """

    row: int
    size: int


class Copies:
    """Which stored row each row of an index is.

    Rows and stored rows are numbered in the order in which they were added.

    Attributes:
        stored_rows: (n,) int64, the stored row of each row.
        stored: the number of stored rows.
    """

    def __init__(self, stored_rows: np.ndarray | None = None, stored: int = 0, digests: bytes | None = b"") -> None:
        self.stored_rows = np.empty(0, np.int64) if stored_rows is None else stored_rows
        self.stored = stored
        # Of the last stored rows, one after the other; those of earlier ones may not be known. None: of no row yet.
        self._digests = digests
        self._known: dict[bytes, int] | None = None

    @classmethod
    def none(cls, rows: int, digests: bytes | None = b"") -> Copies:
        """The copies among rows of which none is taken for a copy."""
        return cls(np.arange(rows), rows, digests)

    @classmethod
    def among(cls, rows: Tensor) -> tuple[Copies, Tensor]:
        """Find the copies among rows (n, D) float32 on the CPU.

        Returns:
            The copies, and the rows (s,) int64 to be stored.
        """
        values = rows.numpy()
        # Most rows differ in the sum of their bits, which takes no time; only the others are looked at.
        words = values.view(np.uint64 if values.shape[1] % 2 == 0 and values.flags.c_contiguous else np.uint32)
        _, place, counts = np.unique(words.sum(axis=1, dtype=np.uint64), return_inverse=True, return_counts=True)
        first: dict[bytes, int] = {}
        original = np.arange(len(values))
        for row in (counts[place] > 1).nonzero()[0].tolist():
            original[row] = first.setdefault(_digest(values[row]), row)
        is_stored = original == np.arange(len(values))
        number = is_stored.cumsum() - 1
        return cls(number[original], int(is_stored.sum()), None), torch.from_numpy(is_stored.nonzero()[0])

    def __len__(self) -> int:
        return len(self.stored_rows)

    @property
    def any(self) -> bool:
        """Whether there is a copy."""
        return self.stored < len(self)

    def place(self, rows: Tensor, stored_before: Iterable[np.ndarray]) -> Tensor:
        """Append rows.

        Args:
            rows: (b, D) float32.
            stored_before: pieces of all stored rows, which are looked at only if their digests are not known yet.

        Returns:
            The places in `rows` (s,) int64 of those that have to be stored.
        """
        if self._digests is None:
            self._digests = b"".join(_digest(row) for piece in stored_before for row in piece)
        if self._known is None:
            digests, unknown = self._digests, self.stored - len(self._digests) // _DIGEST
            starts = range(0, len(digests), _DIGEST)
            self._known = {digests[i : i + _DIGEST]: unknown + i // _DIGEST for i in starts}
        known, fresh, places = self._known, [], []
        for i, row in enumerate(np.ascontiguousarray(rows.cpu().numpy())):
            place = known.setdefault(_digest(row), self.stored)
            if place == self.stored:
                fresh.append(i)
                self.stored += 1
            places.append(place)
        self.stored_rows = np.concatenate([self.stored_rows, np.array(places, np.int64)])
        self.__dict__.pop("_members", None)
        return torch.tensor(fresh, dtype=torch.int64)

    @cached_property
    def _members(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows (n,) in the order of what they are stored as, and the start and number (s,) of those of each."""
        sizes = np.bincount(self.stored_rows, minlength=self.stored)
        order = self.stored_rows.argsort(kind="stable")
        return torch.from_numpy(order), torch.from_numpy(sizes.cumsum() - sizes), torch.from_numpy(sizes)

    def largest(self) -> Group:
        """The largest group of rows that are the same."""
        order, starts, sizes = self._members
        stored = int(sizes.argmax())
        return Group(int(order[starts[stored]]), int(sizes[stored]))

    def ranked(self, stored_rows: Tensor, distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest rows of each query, rows at the same distance in the order in which they were added.

        Args:
            stored_rows: (q, d) stored rows that were found, in any order; -1 for none.
            distances: (q, d) of any kind; those to nothing are infinite.
            k: rows per query.

        Returns:
            (q, k) int64 rows, -1 at the end where fewer were found, and (q, k) distances.
        """
        rows = stored_rows
        if self.any:
            order, starts, sizes = self._members
            rows = torch.where(stored_rows >= 0, order[starts[stored_rows.clamp_min(0)]], -1)
        by_row = rows.argsort(dim=1)
        # A stable sort leaves rows at the same distance in the order of the sort before.
        by = by_row.gather(1, distances.gather(1, by_row).argsort(dim=1, stable=True))
        rows, distances, stored_rows = (field.gather(1, by) for field in (rows, distances, stored_rows))
        missing = k - rows.shape[1]
        nearest = torch.nn.functional.pad(rows, (0, max(0, missing)), value=-1)[:, :k]
        values = torch.nn.functional.pad(distances, (0, max(0, missing)), value=torch.inf)[:, :k]
        if not self.any:
            return nearest, values
        copied = ((sizes[stored_rows.clamp_min(0)] > 1) & (stored_rows >= 0)).any(dim=1)
        nearest, values = nearest.clone(), values.clone()
        for query in copied.nonzero().squeeze(1).tolist():
            there = stored_rows[query][stored_rows[query] >= 0]
            before = sizes[there].cumsum(0) - sizes[there]
            # Those that reach rank k, and those at the distance of the last of them.
            reach = distances[query, int((before < k).sum()) - 1]
            there = there[distances[query, : len(there)] <= reach]
            members = [order[starts[i] : starts[i] + sizes[i].clamp_max(k)] for i in there]
            every = torch.cat(members)
            away = distances[query, : len(there)].repeat_interleave(torch.tensor(list(map(len, members))))
            best = torch.from_numpy(np.lexsort((every.numpy(), away.numpy()))[:k].copy())
            nearest[query, : len(best)], values[query, : len(best)] = every[best], away[best]
        return nearest, values

    def write(self, file: BinaryIO) -> None:
        """Write what `read` needs beside the stored rows."""
        copies = self._copies_only()
        digests = self._digests or b""
        if self._known is not None:
            digests = b"".join(self._known)
        file.write(_MAGIC + _LENGTHS.pack(len(copies), len(digests)))
        file.write(np.stack([copies, self.stored_rows[copies]]).astype("<i8").tobytes() + digests)

    @classmethod
    def read(cls, file: BinaryIO, stored: int) -> Copies:
        """Read what `write` wrote after an index of `stored` rows. In files of earlier versions there is nothing.

        Raises:
            ValueError: it does not fit the index.
        """
        if file.read(len(_MAGIC)) != _MAGIC:
            return cls.none(stored)
        head = file.read(_LENGTHS.size)
        if len(head) < _LENGTHS.size:
            raise ValueError("its list of copies is truncated")
        count, size = _LENGTHS.unpack(head)
        if size % _DIGEST or size > _DIGEST * stored:
            raise ValueError("its list of copies is damaged")
        content = file.read(16 * count + size)
        if len(content) != 16 * count + size:
            raise ValueError("its list of copies is truncated")
        rows, originals = np.frombuffer(content, "<i8", 2 * count).reshape(2, count).astype(np.int64)
        n = stored + count
        if count and not (rows[0] > 0 and rows[-1] < n and (np.diff(rows) > 0).all()):
            raise ValueError("its list of copies is damaged")
        stored_rows = np.empty(n, np.int64)
        is_copy = np.zeros(n, bool)
        is_copy[rows] = True
        stored_rows[~is_copy] = np.arange(stored)
        if count and not (originals.min() >= 0 and (originals < rows).all() and originals.max() < stored):
            raise ValueError("its list of copies is damaged")
        stored_rows[rows] = originals
        return cls(stored_rows, stored, content[16 * count :])

    def first_rows(self) -> np.ndarray:
        """(s,) int64, the first row that each stored row is of."""
        order, starts, _ = self._members
        return order[starts].numpy()

    def originals(self) -> dict[int, int]:
        """For each row that is a copy, the first row of its kind."""
        copies = self._copies_only()
        return dict(zip(copies.tolist(), self.first_rows()[self.stored_rows[copies]].tolist(), strict=True))

    def _copies_only(self) -> np.ndarray:
        """The rows (c,) that are no first of their kind."""
        first = np.zeros(len(self), bool)
        first[self.first_rows()] = True
        return (~first).nonzero()[0]


def _digest(row: Any) -> bytes:
    return hashlib.blake2b(row, digest_size=_DIGEST).digest()
