"""Search in large galleries: build an index once and search it many times.

There are four kinds. "flat" compares a query with every row and works without faiss. The other three need faiss and
look at part of the gallery: "ivf_flat" at the rows of the nearest k-means cells, "ivf_pq" at the same rows, each
compressed to a few bytes, and "hnsw" at a path through a graph of neighbors. How many of the true neighbors they find
depends on the data; `recall_against_exact` measures it. `gcahng.retrieval.nearest` gives the exact order, ties
included.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.extras import require_faiss
from gcahng.progress import Progress
from gcahng.retrieval.candidates import choose_backend
from gcahng.retrieval.index_base import KINDS, METRICS, Index, IndexSettings, SearchResult
from gcahng.retrieval.index_faiss import FaissIndex
from gcahng.retrieval.index_torch import TorchIndex
from gcahng.retrieval.neighbors import nearest
from gcahng.retrieval.rows import check_embeddings, dtype_name

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
    """Build an index of the rows of `embeddings`. An approximate kind is first trained on a sample of them.

    Args:
        embeddings: (n, D), any floating dtype. If they are on a GPU, "flat" is searched there, and "ivf_flat" and
            "ivf_pq" too if faiss supports GPUs. "hnsw" is always searched on the CPU.
        kind: "flat", "ivf_flat", "ivf_pq" or "hnsw".
        metric: "cosine" (inner products of rows scaled to norm 1) or "euclidean".
        backend: "torch" (only for "flat"), "faiss", or "auto", which is faiss if it is installed. For "flat" on a GPU,
            "auto" is faiss only if it supports GPUs.
        settings: settings of an approximate kind.
        progress: called with the rows added so far and in total.

    Returns:
        The index.

    Raises:
        UserError: an argument has a wrong shape, type or range; a value is not finite; a row is zero with "cosine";
            the kind needs faiss, which is not installed; or there are too few rows to train on.
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
    """Read an index that `Index.write` wrote.

    Args:
        file: an open binary file.
        kind: kind of the index, which not every file contains.
        metric: metric of the index, likewise.
        backend: as in `build_index`. Either backend reads a "flat" index that the other one wrote.
        device: device that the search runs on, within the limits that `build_index` names.

    Returns:
        The index.

    Raises:
        UserError: the file is not an index of this kind and metric, or faiss is needed and not installed.
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
        raise UserError(f'the file is not an index ({error}); it must be a "flat" index that gcahng wrote') from None
    if rows.ndim != 2 or rows.dtype != torch.float32 or not rows.shape[1]:
        raise UserError(
            f"the index has {dtype_name(rows)} rows of shape {tuple(rows.shape)}; it must have float32 rows (n, D)"
        )
    if backend == "torch":
        return TorchIndex.of_rows(rows, metric, device)
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
    """The share of the k exact nearest neighbors that the index finds among its first k, averaged over the queries.

    Args:
        index: an index of `embeddings`.
        embeddings: (n, D) the gallery.
        queries: (q, D).
        k: neighbors per query, at most n.
        effort: as in `Index.search`.
        progress: called with the queries compared so far and in total.

    Returns:
        The share, from 0 to 1.

    Raises:
        UserError: the index does not have n rows of D channels, or an argument is one that `Index.search` or `nearest`
            refuses.
    """
    check_embeddings("embeddings", embeddings)
    if (len(index), index.dim) != tuple(embeddings.shape):
        raise UserError(
            f"embeddings has shape {tuple(embeddings.shape)}; it must have that of the index, {(len(index), index.dim)}"
        )
    approximate = index.search(queries, k, effort=effort).indices.cpu()
    exact = nearest(
        queries, k, gallery_embeddings=embeddings, normalize=index.metric == "cosine", progress=progress
    ).cpu()
    hits = sum(
        int((a.unsqueeze(2) == b.unsqueeze(1)).sum())
        for a, b in zip(approximate.split(256), exact.split(256), strict=True)
    )
    return hits / exact.numel()


def _read_rows(file: BinaryIO) -> np.ndarray:
    """Read the array of a .npy file from the current position.

    The array of a file on disk is mapped into memory. Then faiss makes the only copy, and torch makes none.
    """
    try:
        file.fileno()
    except (AttributeError, OSError):
        return np.lib.format.read_array(file, allow_pickle=False)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it has another version of the .npy format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    order = "F" if fortran_order else "C"
    # Copy on write, because PyTorch warns about arrays that are read-only.
    return np.memmap(file, dtype, "c", offset=file.tell(), shape=shape, order=order)


def _choose(kind: str, backend: str, device: torch.device) -> str:
    """The backend to use for an index of this kind on this device."""
    if kind == "flat" or backend not in ("auto", "torch", "faiss"):
        return choose_backend(backend, device)
    if backend == "torch":
        raise UserError(
            f'backend is "torch" and kind is {kind!r}; it must be "faiss" or "auto", because torch has only "flat"'
        )
    require_faiss(f"kind={kind!r}")
    return "faiss"


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
