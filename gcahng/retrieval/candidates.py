"""Candidates for the nearest neighbors, from float32 products with the whole gallery, and a bound on their error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.extras import faiss_missing, require_faiss
from gcahng.retrieval.rows import Rows

BACKENDS = ("auto", "torch", "faiss")

# Gallery rows that are compared at once: with 1,024 queries, 256 MiB of float32 distances.
_GALLERY_BLOCK = 1 << 16
# `smallest` first looks at the minimum of each group of this many distances.
_GROUP = 8
# The most neighbors that an index of faiss on a GPU returns, and the most cells that it looks at.
GPU_NEIGHBORS = 2048

_log = logging.getLogger("gcahng")
_warned: set[str] = set()


class TorchCandidates:
    """Proposes candidates from matrix products with the gallery, on its device."""

    def __init__(self, gallery: Rows):
        self.dtype = torch.float32 if float32_products_are_float32(gallery.values.device) else torch.float64
        self._gallery = gallery.all(self.dtype)
        self._squares = self._gallery.square().sum(dim=1)
        self._buffer = torch.empty(0, dtype=self.dtype, device=self._gallery.device)

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest candidates of the queries.

        Args:
            queries: (q, D) scaled rows.
            k: number of candidates.

        Returns:
            (q, k) squared distances, ascending, and (q, k) int64 gallery rows.
        """
        nearest_in_block = []
        for start, distances in self.distances(queries):
            values, indices = smallest(distances, min(k, distances.shape[1]))
            nearest_in_block.append((values, indices + start))
        if len(nearest_in_block) == 1:
            return nearest_in_block[0]
        values, indices = (torch.cat(blocks, dim=1) for blocks in zip(*nearest_in_block, strict=True))
        values, order = values.sort(dim=1)
        return values[:, :k], indices.gather(1, order[:, :k])

    def distances(self, queries: Tensor, width: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield squared distances to `width` gallery rows at a time.

        The distances are in a buffer that the next block overwrites, because so large a tensor would be mapped into
        memory again each time.

        Yields:
            The index of the first gallery row, and the distances (q, at most width).
        """
        width = min(width or _GALLERY_BLOCK, len(self._gallery))
        if self._buffer.numel() < len(queries) * width:
            self._buffer = self._buffer.new_empty(len(queries) * width)
        for start in range(0, len(self._gallery), width):
            rows = self._gallery[start : start + width]
            out = self._buffer[: len(queries) * len(rows)].view(len(queries), len(rows))
            yield start, square_distances(queries, rows, self._squares[start : start + width], out)


class FaissCandidates:
    """Proposes candidates from a flat index of faiss, on the gallery's GPU if faiss supports it, else on the CPU."""

    dtype = torch.float32

    def __init__(self, gallery: Rows):
        import faiss

        index = faiss.IndexFlatL2(gallery.dim)
        self._most = sys.maxsize
        if gallery.values.is_cuda and faiss_sees_gpus():
            index = to_gpu(index, gallery.values.device)
            self._most = GPU_NEIGHBORS
        index.add(gallery.all(torch.float32).cpu().numpy())
        self._index, self._gallery = index, gallery

    @cached_property
    def _torch(self) -> TorchCandidates:
        return TorchCandidates(self._gallery)

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same as `TorchCandidates`, which is used if k is more than an index on a GPU can return."""
        if k > self._most:
            return self._torch(queries.to(self._torch.dtype), k)
        distances, indices = self._index.search(queries.cpu().contiguous().numpy(), k)
        return torch.from_numpy(distances).to(queries.device), torch.from_numpy(indices).to(queries.device)


def smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same as `values.topk(k, largest=False)`, but faster if k is small compared with the number of columns.

    Columns are taken in groups of eight. The k smallest values are in the k groups with the smallest minima, or in the
    columns that are left over.

    Args:
        values: (q, m).
        k: how many values, at most m.

    Returns:
        (q, k) values, ascending, and (q, k) int64 columns.
    """
    q, m = values.shape
    groups = m // _GROUP
    if 4 * k > groups:
        return values.topk(k, dim=1, largest=False)
    # Group j has the columns j, j + groups, …, so that minima are taken along whole rows of memory.
    whole = values[:, : groups * _GROUP].view(q, _GROUP, groups)
    first = whole.amin(dim=1).topk(k, dim=1, largest=False, sorted=False).indices.unsqueeze(1)
    columns = first + torch.arange(_GROUP, device=values.device).unsqueeze(1) * groups
    rest = torch.arange(groups * _GROUP, m, device=values.device).expand(q, -1)
    columns = torch.cat([columns.flatten(1), rest], dim=1)
    values, order = values.gather(1, columns).topk(k, dim=1, largest=False)
    return values, columns.gather(1, order)


def square_distances(
    queries: Tensor, gallery: Tensor, squares: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Squared distances from matrix products; the error of each is at most `rounding`.

    Args:
        queries: (q, D).
        gallery: (m, D).
        squares: (m,) the squared norms of `gallery`, if they are known.
        out: (q, m) tensor to write the result into.

    Returns:
        (q, m).
    """
    squares = gallery.square().sum(dim=1) if squares is None else squares
    distances = torch.addmm(squares, queries, gallery.mT, alpha=-2, out=out)
    return distances.add_(queries.square().sum(dim=1, keepdim=True))


def rounding(dim: int, dtype: torch.dtype) -> float:
    """A bound on the error of `square_distances` for rows of norm at most 1.

    The error of each product of rows is at most (D + 2) u, in any order of summation (Higham, Accuracy and Stability of
    Numerical Algorithms, 3.1). That of each of the three additions is at most u. All are times (|q| + |g|)² <= 4. The
    rest covers terms of second order and the float64 distance that the result is compared with.

    Args:
        dim: D.
        dtype: dtype of the products.
    """
    return 4.1 * (dim + 16) * torch.finfo(dtype).eps / 2


def float32_products_are_float32(device: torch.device) -> bool:
    """Whether float32 matrix products have full precision under the current settings, without TF32 or bfloat16."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    return backend.fp32_precision in ("none", "ieee")


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend to use for tensors on `device`, "torch" or "faiss".

    Raises:
        UserError: `backend` is unknown or not installed.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if reason := faiss_missing():
            warn_once_without_faiss(reason)
            return "torch"
        return "faiss" if device.type == "cpu" or (device.type == "cuda" and faiss_sees_gpus()) else "torch"
    if backend == "faiss":
        require_faiss('backend="faiss"')
    return backend


def faiss_sees_gpus() -> bool:
    """Whether the installed faiss supports GPUs and there is one."""
    import faiss

    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def to_gpu(index: Any, device: torch.device) -> Any:
    """Copy a faiss index to a GPU.

    Raises:
        RuntimeError: faiss does not support this index on a GPU.
    """
    import faiss

    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)


def warn_once_without_faiss(reason: str) -> None:
    """Log, once in a process, that faiss would be faster, and why it is not used."""
    if "faiss" not in _warned:
        _warned.add("faiss")
        _log.warning("retrieval searches without faiss, which would be faster in large galleries: %s", reason)
