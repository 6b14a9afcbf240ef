"""Search in large galleries: build an index once, search it again and again.

Four kinds. "flat" compares a query with every row and works without faiss; the other three look at part of the gallery
and need it: "ivf_flat" at the rows of the nearest k-means cells, "ivf_pq" at the same rows, each compressed to a few
bytes, "hnsw" along a graph of neighbours. How many of the true neighbours they find depends on the data: measure it
with `recall_against_exact`. For the exact order, ties included, see `gcahng.retrieval.nearest`.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.progress import Progress
from gcahng.retrieval.candidates import choose_backend
from gcahng.retrieval.index_base import KINDS, METRICS, Index, IndexSettings, SearchResult
from gcahng.retrieval.index_faiss import FaissIndex
from gcahng.retrieval.index_torch import TorchIndex
from gcahng.retrieval.neighbours import nearest
from gcahng.retrieval.rows import check_embeddings

__all__ = [
    "KINDS",
    "METRICS",
    "Index",
    "IndexSettings",
    "SearchResult",
    "build_index",
    "read_index",
    "recall_against_exact",
]


def build_index(
    embeddings: Tensor,
    kind: str = "flat",
    *,
    metric: str = "cosine",
    backend: str = "auto",
    settings: IndexSettings | None = None,
    progress: Progress | None = None,
) -> Index:
    """An index of the rows of `embeddings`; an approximate kind is trained on a sample of them first.

    Args:
        embeddings: (n, D), any floating dtype. On a GPU, the search runs there: that of "flat" in any case, that of
            "ivf_flat" and "ivf_pq" where faiss has GPUs; "hnsw" is searched on the CPU.
        kind: "flat", "ivf_flat", "ivf_pq" or "hnsw".
        metric: "cosine" (inner products of rows scaled to norm 1) or "euclidean".
        backend: "torch" (only "flat"), "faiss", or "auto": faiss where it is installed (for "flat" on a GPU: one that
            has GPUs).
        settings: of the approximate kinds.
        progress: called with the rows added so far and all of them.

    Raises:
        UserError: an argument of a wrong shape, type or range; non-finite values; a zero row with "cosine"; a kind that
            needs faiss where it is not installed; too few rows to train on.
    """
    check_embeddings("embeddings", embeddings)
    _check_choice("kind", kind, KINDS)
    _check_choice("metric", metric, METRICS)
    settings = settings or IndexSettings()
    if _choose(kind, backend, embeddings.device) == "torch":
        index: Index = TorchIndex(embeddings.shape[1], metric, embeddings.device)
    else:
        index = FaissIndex.train(embeddings, kind, metric, settings)
    index.add(embeddings, progress=progress)
    return index


def read_index(
    file: BinaryIO, kind: str, metric: str, *, backend: str = "auto", device: torch.device | str = "cpu"
) -> Index:
    """The index that `Index.write` wrote; kind and metric are not in the file of every kind, so they are given.

    A "flat" one is readable by either backend, whichever wrote it. device: what the search runs on, as far as
    `build_index` says.

    Raises:
        UserError: what is in the file is no index of this kind and metric; faiss is needed and not installed.
    """
    _check_choice("kind", kind, KINDS)
    _check_choice("metric", metric, METRICS)
    device = torch.device(device)
    backend = _choose(kind, backend, device)
    if kind != "flat":
        return FaissIndex.read(file, kind, metric, device)
    try:
        rows = torch.from_numpy(_read_rows(file))
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f'the index must be a "flat" one written by gcahng, got a file that is not: {error}') from None
    if rows.ndim != 2 or rows.dtype != torch.float32 or not rows.shape[1]:
        raise UserError(f"the index must hold float32 rows (n, D), got {tuple(rows.shape)} {rows.dtype}")
    if backend == "torch":
        return TorchIndex(rows.shape[1], metric, device, [rows.to(device)])
    return FaissIndex.of_rows(rows, metric, device)


def recall_against_exact(
    index: Index,
    embeddings: Tensor,
    queries: Tensor,
    k: int = 10,
    *,
    effort: int | None = None,
    progress: Progress | None = None,
) -> float:
    """The part of the k exact nearest neighbours that the index finds among its first k, mean over the queries.

    Args:
        index: of `embeddings`.
        embeddings: (n, D) the gallery.
        queries: (q, D).
        k: neighbours a query, at most n.
        effort: as in `Index.search`.
        progress: called with the queries compared so far and all of them.

    Raises:
        UserError: the index does not hold n rows of D channels; as `Index.search` and `nearest`.
    """
    check_embeddings("embeddings", embeddings)
    if (len(index), index.dim) != tuple(embeddings.shape):
        raise UserError(
            f"embeddings must be the ({len(index)}, {index.dim}) rows of the index, got {tuple(embeddings.shape)}"
        )
    found = index.search(queries, k, effort=effort).indices.cpu()
    exact = nearest(
        queries, k, gallery_embeddings=embeddings, normalize=index.metric == "cosine", progress=progress
    ).cpu()
    hits = sum(
        int((a.unsqueeze(2) == b.unsqueeze(1)).sum()) for a, b in zip(found.split(256), exact.split(256), strict=True)
    )
    return hits / exact.numel()


def _read_rows(file: BinaryIO) -> np.ndarray:
    """The array of a .npy file from where it stands, mapped into memory where the file is one on a disk: faiss then
    makes the only copy, and torch none."""
    try:
        file.fileno()
    except (AttributeError, OSError):
        return np.lib.format.read_array(file, allow_pickle=False)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("its rows are in another version of the .npy format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    order = "F" if fortran_order else "C"
    # Copy on write: PyTorch warns of arrays that cannot be written to.
    return np.memmap(file, dtype, "c", offset=file.tell(), shape=shape, order=order)


def _choose(kind: str, backend: str, device: torch.device) -> str:
    """The backend that `backend` means for this kind on a device."""
    if kind == "flat" or backend not in ("auto", "torch", "faiss"):
        return choose_backend(backend, device)
    if backend == "torch":
        raise UserError(f'backend must be "faiss" or "auto" for kind {kind!r}, got "torch", which has only "flat"')
    require("faiss", extra="faiss-cpu", purpose=f"kind={kind!r}")
    return "faiss"


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
