"""What every kind of index offers and how it is set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.progress import Progress
from gcahng.retrieval.rows import check_embeddings, check_norms, split

KINDS = ("flat", "ivf_flat", "ivf_pq", "hnsw")
METRICS = ("cosine", "euclidean")

# Of settings: the least and the most. faiss keeps them in a C int; with one link a node it crashes.
_C_INT = 2**31 - 1
_RANGES = {"seed": (0, _C_INT), "links": (2, 4096), "build_breadth": (1, _C_INT), "search_breadth": (1, _C_INT)}

# Rows normalised, added or written at once: 64 MiB of float32 at 512 channels.
ROWS = 1 << 15


class SearchResult(NamedTuple):
    """What a search found, nearest first.

    Attributes:
        indices: (q, k) int64 rows of the gallery in the order they were added; -1 where an approximate index found
            fewer than k.
        values: (q, k) float32, cosine similarities (descending) or Euclidean distances (ascending); -inf or inf where
            the index is -1.
    """

    indices: Tensor
    values: Tensor


@dataclass(frozen=True)
class IndexSettings:
    """How an approximate index is built; each kind reads its own.

    Attributes:
        lists: k-means cells of "ivf_flat" and "ivf_pq"; None: 4 sqrt(n), but at least 39 rows a cell.
        probes: cells looked at in a search; None: one in 32.
        code_bytes: bytes a row of "ivf_pq", a divisor of D; None: the largest up to D / 4.
        links: neighbours a node of the graph of "hnsw", from 2 to 4,096.
        build_breadth: nodes kept in view while the graph is built (efConstruction).
        search_breadth: nodes kept in view in a search (efSearch), at least k.
        seed: of the training sample and of k-means.
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
            value, optional = getattr(self, field.name), field.default is None
            least, most = _RANGES.get(field.name, (1, None))
            if optional and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{field.name} must be an integer of at least {least}, got {value!r}")
            if most is not None and value > most:
                raise UserError(f"{field.name} must be an integer in {least}..{most}, got {value}")


class Index:
    """What the kinds of index share. Made by `build_index` or `read_index`.

    Attributes:
        kind: one of `KINDS`.
        metric: one of `METRICS`.
        backend: "torch" or "faiss".
        dim: D.
    """

    kind: str
    metric: str
    backend: str
    dim: int

    def __len__(self) -> int:
        raise NotImplementedError

    def add(self, embeddings: Tensor, *, progress: Progress | None = None) -> None:
        """Append the rows of `embeddings` (n, D) to the gallery; an approximate index is not trained anew."""
        done = 0
        for rows in self._prepared("embeddings", embeddings):
            self._add(rows)
            done += len(rows)
            if progress is not None:
                progress(done, len(embeddings))

    def search(
        self,
        queries: Tensor,
        k: int = 10,
        *,
        effort: int | None = None,
        chunk: int = 1024,
        progress: Progress | None = None,
    ) -> SearchResult:
        """The k nearest rows of every query (q, D), nearest first, on the device of the queries.

        Args:
            queries: (q, D), any floating dtype.
            k: neighbours a query, at most the rows of the index.
            effort: in this search, the cells looked at ("ivf_flat", "ivf_pq") or the nodes kept in view ("hnsw"); None:
                as the index was built. More finds more of the true neighbours and takes longer.
            chunk: queries searched at once.
            progress: called with the queries searched so far and all of them.

        Raises:
            UserError: an argument of a wrong shape, type or range; non-finite values; a zero row with "cosine".
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(self):
            raise UserError(f"k must be an integer in 1..{len(self)} (the rows of the index), got {k!r}")
        if effort is not None and (isinstance(effort, bool) or not isinstance(effort, int) or effort < 1):
            raise UserError(f"effort must be a positive integer, got {effort!r}")
        found, done = [], 0
        for rows in self._prepared("queries", queries, chunk):
            found.append(self._search(rows, k, effort))
            done += len(rows)
            if progress is not None:
                progress(done, len(queries))
        indices, values = (torch.cat(part).to(queries.device) for part in zip(*found, strict=True))
        return SearchResult(indices, values)

    def write(self, file: BinaryIO) -> None:
        """Write the index to an open binary file, in pieces (`gcahng.files.atomic_write` takes this method)."""
        raise NotImplementedError

    def _add(self, rows: Tensor) -> None:
        raise NotImplementedError

    def _search(self, rows: Tensor, k: int, effort: int | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _prepared(self, name: str, embeddings: Tensor, chunk: int = ROWS) -> Iterator[Tensor]:
        """Pieces of `embeddings`, scaled to norm 1 for the cosine, as float32."""
        check_embeddings(name, embeddings, self.dim)
        return prepared(name, embeddings, self.metric, chunk)


def prepared(name: str, embeddings: Tensor, metric: str, chunk: int = ROWS) -> Iterator[Tensor]:
    """Pieces of the rows (n, D) in float32, for "cosine" scaled to norm 1; UserError before the first at a zero row."""
    norms = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in split(embeddings.detach(), ROWS)]
    check_norms(name, torch.cat(norms), metric == "cosine", right_for=f'metric="{metric}"')
    for rows in split(embeddings.detach(), chunk):
        if metric == "cosine":
            rows = rows.double()
            rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        yield rows.float().contiguous()


def write_rows(file: BinaryIO, n: int, dim: int, pieces: Iterator[np.ndarray]) -> None:
    """The rows as a .npy file of float32 (n, dim), little-endian, piece by piece."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (n, dim)}
    np.lib.format.write_array_header_1_0(file, header)
    for piece in pieces:
        file.write(np.ascontiguousarray(piece, dtype="<f4").tobytes())
