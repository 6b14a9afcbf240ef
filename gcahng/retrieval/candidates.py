"""Candidates for the nearest neighbours, by float32 products with the whole gallery, and how far off those may be."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.retrieval.rows import Rows

BACKENDS = ("auto", "torch", "faiss")

# Gallery rows compared at once: with 1,024 queries 256 MiB of float32 distances.
_GALLERY_BLOCK = 1 << 16
# Distances of which `smallest` first looks at the least.
_GROUP = 8
# Neighbours that faiss's indices on a GPU give at the most, and cells that they look at.
GPU_NEIGHBOURS = 2048

_log = logging.getLogger("gcahng")
_said: set[str] = set()


class TorchCandidates:
    """Proposes candidates by products with the gallery, on its device."""

    def __init__(self, gallery: Rows):
        self.dtype = torch.float32 if float32_products_are_float32(gallery.values.device) else torch.float64
        self._gallery = gallery.all(self.dtype)
        self._squares = self._gallery.square().sum(dim=1)
        self._buffer = torch.empty(0, dtype=self.dtype, device=self._gallery.device)

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k smallest distances (q, k), ascending, of the queries (q, D), and whose they are (q, k)."""
        found = []
        for start, distances in self.distances(queries):
            values, indices = smallest(distances, min(k, distances.shape[1]))
            found.append((values, indices + start))
        if len(found) == 1:
            return found[0]
        values, indices = (torch.cat(part, dim=1) for part in zip(*found, strict=True))
        values, order = values.sort(dim=1)
        return values[:, :k], indices.gather(1, order[:, :k])

    def distances(self, queries: Tensor, width: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """For `width` gallery rows after the other, the first one's index and the distances (q, <= width) to them.

        They are in a buffer that the next block overwrites: memory as large as this would be mapped anew each time.
        """
        width = min(width or _GALLERY_BLOCK, len(self._gallery))
        if self._buffer.numel() < len(queries) * width:
            self._buffer = self._buffer.new_empty(len(queries) * width)
        for start in range(0, len(self._gallery), width):
            rows = self._gallery[start : start + width]
            out = self._buffer[: len(queries) * len(rows)].view(len(queries), len(rows))
            yield start, square_distances(queries, rows, self._squares[start : start + width], out)


class FaissCandidates:
    """Proposes candidates by faiss's flat index: on the gallery's GPU where faiss has it, else on the CPU.

    Not run on a GPU: written without one at hand.
    """

    dtype = torch.float32

    def __init__(self, gallery: Rows):
        import faiss

        index = faiss.IndexFlatL2(gallery.dim)
        self._most = sys.maxsize
        if gallery.values.is_cuda and faiss_sees_gpus():
            index = to_gpu(index, gallery.values.device)
            self._most = GPU_NEIGHBOURS
        index.add(gallery.all(torch.float32).cpu().numpy())
        self._index, self._gallery = index, gallery

    @cached_property
    def _torch(self) -> TorchCandidates:
        return TorchCandidates(self._gallery)

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `TorchCandidates`, which takes the place of a GPU's index that does not give so many."""
        if k > self._most:
            return self._torch(queries.to(self._torch.dtype), k)
        distances, indices = self._index.search(queries.cpu().contiguous().numpy(), k)
        return torch.from_numpy(distances).to(queries.device), torch.from_numpy(indices).to(queries.device)


def smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`values.topk(k, largest=False)` of each row (q, m), faster where k is small beside m.

    The k smallest are in the k groups of eight columns whose least members are smallest, or in the columns left over.
    """
    q, m = values.shape
    groups = m // _GROUP
    if 4 * k > groups:
        return values.topk(k, dim=1, largest=False)
    # Group j has the columns j, j + groups, ..., so that the minima are taken along whole rows of memory.
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
    """(q, m) squared distances by products; wrong by at most `rounding`.

    Args:
        queries: (q, D).
        gallery: (m, D).
        squares: (m,) the squared norms of `gallery`, where they are known.
        out: (q, m) where to write them.
    """
    squares = gallery.square().sum(dim=1) if squares is None else squares
    distances = torch.addmm(squares, queries, gallery.mT, alpha=-2, out=out)
    return distances.add_(queries.square().sum(dim=1, keepdim=True))


def rounding(dim: int, dtype: torch.dtype) -> float:
    """A bound on the error of a squared distance of rows of norm at most 1, made of `dtype` products of `dim` channels.

    Each product of rows errs by (D + 2) u at most, whatever the order of its sum (Higham, Accuracy and Stability of
    Numerical Algorithms, 3.1), and each of the three additions by u, all times (|q| + |g|)^2 <= 4. The rest is for the
    second order and for the float64 distance it is compared with.
    """
    return 4.1 * (dim + 16) * torch.finfo(dtype).eps / 2


def float32_products_are_float32(device: torch.device) -> bool:
    """Whether products of float32 matrices keep their precision under the settings in force (no TF32, no bfloat16)."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    return backend.fp32_precision in ("none", "ieee")


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend that `backend` means for tensors on `device`; UserError for one that is not there."""
    if backend not in BACKENDS:
        raise UserError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        if importlib.util.find_spec("faiss") is None:
            say_once_without_faiss()
            return "torch"
        return "faiss" if device.type == "cpu" or (device.type == "cuda" and faiss_sees_gpus()) else "torch"
    if backend == "faiss":
        require("faiss", extra="faiss-cpu", purpose='backend="faiss"')
    return backend


def faiss_sees_gpus() -> bool:
    """Whether the installed faiss is one with GPUs, and there is one."""
    import faiss

    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def to_gpu(index: Any, device: torch.device) -> Any:
    """A faiss index on this GPU; RuntimeError for one that faiss does not have there."""
    import faiss

    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)


def say_once_without_faiss() -> None:
    """The first time in a process, that faiss would be faster."""
    if "faiss" not in _said:
        _said.add("faiss")
        _log.warning(
            "retrieval searches in torch; faiss would be faster in large galleries: "
            'pip install "gcahng[faiss-cpu]" or "gcahng[faiss-gpu]"'
        )
