"""The interface of every kind of index, and its settings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gcahng.bounds import check_number
from gcahng.errors import UserError, UserNote
from gcahng.progress import Progress
from gcahng.retrieval.copies import Copies
from gcahng.retrieval.rows import check_embeddings, check_norms, split

KINDS = ("flat", "ivf_flat", "ivf_pq", "hnsw")
METRICS = ("cosine", "euclidean")

# Rows that are normalized, added or written at once: 64 MiB of float32 with 512 channels.
ROWS = 1 << 15
# Neighbors that are asked for beyond k, so that those at the distance of the k-th are among them.
_MARGIN = 32
# Neighbors of all queries of a search that are held at once: 192 MiB.
_AT_ONCE = 1 << 24
# A warning is due where so many rows are the same, and so large a part of all.
_MANY_COPIES, _MANY_OF = 20, 100


class SearchResult(NamedTuple):
    """The result of a search, nearest first.

    Attributes:
        indices: (q, k) int64 gallery rows, numbered in the order they were added; -1 at the end of a query for which an
            approximate index found fewer than k.
        values: (q, k) float32 cosine similarities (descending) or Euclidean distances (ascending); -inf or inf where
            the index is -1.
    """

    indices: Tensor
    values: Tensor


@dataclass(frozen=True)
class IndexSettings:
    """How an approximate index is built. Each kind uses the settings that apply to it.

    Attributes:
        lists: number of k-means cells of "ivf_flat" and "ivf_pq"; None means 4 √n, but at least 39 rows per cell.
        probes: number of cells that a search looks at; None means one in 32.
        code_bytes: bytes per row of "ivf_pq", a divisor of D; None means the largest divisor up to D / 4.
        links: neighbors per node in the graph of "hnsw", from 2 to 4,096.
        build_breadth: candidates that are tracked while the graph is built (efConstruction of HNSW).
        search_breadth: candidates that are tracked in a search (efSearch of HNSW), at least k.
        seed: seed of the training sample and of k-means.

    Raises:
        UserError: a setting is out of range.
    """

    lists: int | None = None
    probes: int | None = None
    code_bytes: int | None = None
    links: int = 32
    build_breadth: int = 80
    search_breadth: int = 128
    seed: int = 0

    def __post_init__(self):
        for field in fields(self):
            none = "None" if field.default is None else None
            key = "index seed" if field.name == "seed" else None
            check_number(field.name, getattr(self, field.name), none=none, key=key)


class Index:
    """The base of every kind of index. `build_index` and `read_index` make one.

    Attributes:
        kind: one of `KINDS`.
        metric: one of `METRICS`.
        backend: "torch" or "faiss".
        dim: D.
        copies: which rows are the same. Those are stored only once.
    """

    kind: str
    metric: str
    backend: str
    dim: int
    copies: Copies
    _said_copies = False

    def __len__(self) -> int:
        return len(self.copies)

    def add(self, embeddings: Tensor, *, progress: Progress | None = None) -> None:
        """Append rows to the gallery. An approximate index is not trained again.

        Args:
            embeddings: (n, D), any floating dtype.
            progress: called with the rows added so far and in total.

        Raises:
            UserError: an argument has a wrong shape or type, a value is not finite, or a row is zero with "cosine".
        """
        done = 0
        for rows in self._prepared("embeddings", embeddings):
            fresh = self.copies.place(rows, self._stored())
            if len(fresh):
                self._add(rows if len(fresh) == len(rows) else rows[fresh.to(rows.device)])
            done += len(rows)
            if progress is not None:
                progress(done, len(embeddings))
        self._warn_of_copies()

    def search(
        self,
        queries: Tensor,
        k: int = 10,
        *,
        effort: int | None = None,
        chunk: int = 1024,
        progress: Progress | None = None,
    ) -> SearchResult:
        """Find the k nearest rows of every query.

        Rows at the same distance come in the order in which they were added, so that the first of 100 neighbors are
        the neighbors that a search for 10 finds. With "hnsw" this holds up to its search breadth, as more neighbors
        mean more breadth.

        Args:
            queries: (q, D), any floating dtype.
            k: neighbors per query, at most the number of rows in the index.
            effort: number of cells that this search looks at ("ivf_flat", "ivf_pq"), or of candidates that it tracks
                ("hnsw"); None means the setting that the index was built with. More effort finds more of the true
                neighbors and takes longer.
            chunk: queries that are searched at once.
            progress: called with the queries searched so far and in total.

        Returns:
            The neighbors, nearest first, on the device of the queries.

        Raises:
            UserError: an argument has a wrong shape, type or range, a value is not finite, or a row is zero with
                "cosine".
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(self):
            raise UserError(f"k is {k!r}; it must be an integer from 1 to {len(self)}, the number of rows in the index")
        if effort is not None and (isinstance(effort, bool) or not isinstance(effort, int) or effort < 1):
            raise UserError(f"effort is {effort!r}; it must be a positive integer")
        results, done = [], 0
        for rows in self._prepared("queries", queries, chunk):
            results.append(self._nearest(rows, k, effort))
            done += len(rows)
            if progress is not None:
                progress(done, len(queries))
        indices, values = (torch.cat(chunks).to(queries.device) for chunks in zip(*results, strict=True))
        return SearchResult(indices, values)

    def write(self, file: BinaryIO) -> None:
        """Write the index to an open binary file, in pieces."""
        raise NotImplementedError

    def _add(self, rows: Tensor) -> None:
        raise NotImplementedError

    def _search(self, rows: Tensor, k: int, effort: int | None) -> tuple[Tensor, Tensor]:
        """The k nearest stored rows of queries, nearest first, as (q, k) indices and values on any device."""
        raise NotImplementedError

    def _stored(self) -> Iterable[np.ndarray]:
        """Pieces of the stored rows (b, D), scaled; nothing for a kind that does not keep them."""
        return ()

    def _breadth(self, k: int, effort: int | None) -> tuple[int, int]:
        """How many stored rows a search for k rows asks for first, and at most."""
        return min(k + _MARGIN, self.copies.stored), self.copies.stored

    def _nearest(self, rows: Tensor, k: int, effort: int | None) -> tuple[Tensor, Tensor]:
        """The k nearest rows of queries, nearest first, rows at the same distance in order."""
        breadth, most = self._breadth(k, effort)
        while True:
            stored_rows, values = (found.cpu() for found in self._search(rows, breadth, effort))
            distances = values.neg() if self.metric == "cosine" else values
            # Beyond the last one there may be more at its distance. That matters if the k-th is at that distance.
            cut = (distances[:, -1] == distances[:, min(k, breadth) - 1]) & (stored_rows[:, -1] >= 0)
            if breadth >= most or not cut.any():
                break
            breadth = min(2 * breadth, most)
            if len(rows) > 1 and len(rows) * breadth > _AT_ONCE:
                halves = [self._nearest(half, k, effort) for half in rows.chunk(2)]
                first, second = (torch.cat(parts) for parts in zip(*halves, strict=True))
                return first, second
        nearest, distances = self.copies.ranked(stored_rows, distances, k)
        return nearest, distances.neg() if self.metric == "cosine" else distances

    def _warn_of_copies(self) -> None:
        if not self.copies.any or self._said_copies:
            return
        row, size = self.copies.largest()
        if size >= max(_MANY_COPIES, len(self) // _MANY_OF):
            self._said_copies = True
            warnings.warn(
                f"{size - 1} of the {len(self)} rows of the index are the same as row {row}, and a search that finds "
                "one finds all; if they are of a placeholder image, leave it out",
                UserNote,
                stacklevel=3,
            )

    def _prepared(self, name: str, embeddings: Tensor, chunk: int = ROWS) -> Iterator[Tensor]:
        """Check `embeddings` and yield pieces of them in float32, scaled to norm 1 for "cosine"."""
        check_embeddings(name, embeddings, self.dim)
        return prepared(name, embeddings, self.metric, chunk)


def prepared(name: str, embeddings: Tensor, metric: str, chunk: int = ROWS) -> Iterator[Tensor]:
    """Yield pieces of the rows (n, D) in float32, scaled to norm 1 for "cosine".

    Raises:
        UserError: a norm is infinite, or 0 with "cosine". This is checked before the first piece.
    """
    norms = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in split(embeddings.detach(), ROWS)]
    check_norms(name, torch.cat(norms), metric == "cosine", option=f'metric="{metric}"')
    for rows in split(embeddings.detach(), chunk):
        if metric == "cosine":
            rows = rows.double()
            rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        yield rows.float().contiguous()


def write_rows(file: BinaryIO, n: int, dim: int, pieces: Iterator[np.ndarray]) -> None:
    """Write rows (n, dim) as a .npy file of little-endian float32, piece by piece."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (n, dim)}
    np.lib.format.write_array_header_1_0(file, header)
    for piece in pieces:
        file.write(np.ascontiguousarray(piece, dtype="<f4").tobytes())
