"""Exact nearest neighbours: the same answer for every backend, chunk size and thread count.

The order is by squared Euclidean distance, summed channel by channel in float64, and by gallery index where two
distances are equal. On rows of norm 1 (`normalize=True`) that is the order of the cosine similarity.

A backend only proposes candidates, by float32 products. Their distances are then computed in float64, and a bound on
the rounding of the products tells whether a row left out could still belong to the neighbours. Where it could
(duplicates, ties, a collapsed embedding), the whole gallery is scanned again for that query.
"""

import importlib.util
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gcahng._extras import require
from gcahng.errors import UserError

BACKENDS = ("auto", "torch", "faiss")

# Candidates beyond k: enough that distances past the k-th differ by more than float32 rounding, unless there are ties.
_MARGIN = 32
# Elements of a float64 block gathered at once (64 MiB).
_BLOCK = 1 << 23


def nearest(
    embeddings: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    gallery_embeddings: Tensor | None = None,
    normalize: bool = True,
    backend: str = "auto",
    chunk: int = 1024,
) -> Tensor:
    """The k nearest gallery rows of every query, nearest first; ties in the order of the gallery index.

    Without `gallery_embeddings` the gallery is `embeddings` itself, and a row is never its own neighbour: it is removed
    by its index, so that a duplicate of it stays.

    Args:
        embeddings: (n, D), any floating dtype.
        k: neighbours a query, at most the gallery rows there are to choose from.
        queries: (q,) indices of the rows to search for; all n by default.
        gallery_embeddings: (m, D), or None for self-retrieval.
        normalize: order by cosine similarity (rows scaled to norm 1); False orders by Euclidean distance of the rows as
            they are.
        backend: "torch" (on the device of the embeddings), "faiss" (on the CPU), or "auto": faiss for CPU tensors where
            it is installed, torch otherwise. The result is the same.
        chunk: queries searched at once; memory is about chunk x m.

    Returns:
        (q, k) int64 gallery indices, on the device of `embeddings`.

    Raises:
        UserError: an argument of a wrong shape, type or range; non-finite values; a zero row with `normalize=True`;
            "faiss" where it is not installed.
    """
    check_embeddings("embeddings", embeddings)
    if queries is None:
        queries = torch.arange(len(embeddings))
    elif queries.ndim != 1 or queries.dtype not in (torch.int64, torch.int32):
        raise UserError(f"queries must be a 1-D tensor of row indices, got {tuple(queries.shape)} {queries.dtype}")
    elif len(queries) and not 0 <= int(queries.min()) <= int(queries.max()) < len(embeddings):
        raise UserError(f"queries must be in 0..{len(embeddings) - 1}, got {int(queries.min())}..{int(queries.max())}")
    search = NeighbourSearch(embeddings, gallery_embeddings, normalize=normalize, backend=backend)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= search.available:
        raise UserError(f"k must be an integer in 1..{search.available} (the gallery rows to choose from), got {k!r}")
    found = [search(rows, k) for rows in split(queries, chunk)]
    return torch.cat(found).to(embeddings.device) if found else torch.empty(0, k, dtype=torch.int64)


def split(rows: Tensor, chunk: int) -> Iterator[Tensor]:
    """`rows` in pieces of `chunk`; UserError unless that is a positive integer."""
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise UserError(f"chunk must be a positive integer, got {chunk!r}")
    return (rows[start : start + chunk] for start in range(0, len(rows), chunk))


def check_embeddings(name: str, embeddings: Tensor, dim: int | None = None) -> None:
    """UserError unless `embeddings` is a finite, floating (n, D) tensor with n, D >= 1 (and D = `dim`)."""
    if not isinstance(embeddings, Tensor):
        raise UserError(f"{name} must be a tensor of shape (n, D), got {type(embeddings).__name__}")
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise UserError(f"{name} must have shape (n, D) with n, D >= 1, got {tuple(embeddings.shape)}")
    if not embeddings.is_floating_point():
        raise UserError(f"{name} must be floating point, got {embeddings.dtype}")
    if dim is not None and embeddings.shape[1] != dim:
        raise UserError(f"{name} must have {dim} channels like embeddings, got {embeddings.shape[1]}")
    finite = embeddings.isfinite().all(dim=1)
    if not finite.all():
        raise UserError(f"{name} must be finite, row {int(finite.logical_not().nonzero()[0])} is not")


class NeighbourSearch:
    """Searches one gallery again and again: `search(rows, k)` gives the k nearest of some query rows (see `nearest`).

    Args:
        queries: (n, D). They are the gallery too where `gallery` is None; a row is then not its own neighbour.
        gallery: (m, D) or None.
        normalize, backend: as in `nearest`.
    """

    def __init__(
        self, queries: Tensor, gallery: Tensor | None = None, *, normalize: bool = True, backend: str = "auto"
    ):
        check_embeddings("embeddings", queries)
        if gallery is not None:
            check_embeddings("gallery_embeddings", gallery, queries.shape[1])
            if gallery.device != queries.device:
                raise UserError(f"gallery_embeddings must be on {queries.device} like embeddings, got {gallery.device}")
        backend = _choose(backend, queries.device)
        # Only these devices have float64 for the exact distances.
        device = queries.device if queries.device.type in ("cpu", "cuda") else torch.device("cpu")
        self.self_retrieval = gallery is None
        self._queries = _Rows("embeddings", queries.detach().to(device), normalize)
        self._gallery = self._queries
        if gallery is not None:
            self._gallery = _Rows("gallery_embeddings", gallery.detach().to(device), normalize)
        if not normalize:
            largest = max(self._queries.norms.max().item(), self._gallery.norms.max().item())
            divisor = torch.tensor(_power_of_two(largest), dtype=torch.float64, device=device)
            self._queries.divisor = self._gallery.divisor = divisor
        #: Gallery rows that a query can be given.
        self.available = len(self._gallery) - int(self.self_retrieval)
        propose = _FaissCandidates if backend == "faiss" else _TorchCandidates
        self._propose = propose(self._gallery)

    @torch.no_grad()
    def __call__(self, rows: Tensor, k: int) -> Tensor:
        """The k <= `available` nearest gallery indices (q, k) of the queries `rows` (q,), ties by index."""
        rows = rows.to(self._queries.values.device, torch.int64)
        k_candidates = min(k + int(self.self_retrieval) + _MARGIN, len(self._gallery))
        with torch.autocast(rows.device.type, enabled=False):
            bound, candidates = self._propose(self._queries.at(rows, self._propose.dtype), k_candidates)
            candidates = candidates.sort(dim=1).values
            distances = self._distances(rows, candidates)
            # The candidates are in the order of their index, so a stable sort leaves ties in that order.
            distances, order = distances.sort(dim=1, stable=True)
            neighbours = candidates.gather(1, order[:, :k])
            if k_candidates < len(self._gallery):
                # A row that is no candidate is at least as far as the farthest candidate, but for rounding.
                slack = _rounding(self._gallery.dim, self._propose.dtype)
                uncertain = (distances[:, k - 1] >= bound.double() - slack).nonzero().squeeze(1)
                for part in _blocks(uncertain, len(self._gallery)):
                    neighbours[part] = self._rescan(rows[part], k)
        return neighbours

    def _distances(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """Squared distances (q, c) float64 of queries `rows` (q,) to gallery rows `candidates` (q, c).

        Infinite from a query to itself in self-retrieval.
        """
        distances = torch.empty(candidates.shape, dtype=torch.float64, device=candidates.device)
        for part in _blocks(torch.arange(len(rows), device=rows.device), candidates.shape[1] * self._gallery.dim):
            difference = self._gallery.at(candidates[part], torch.float64)
            difference -= self._queries.at(rows[part], torch.float64).unsqueeze(1)
            distances[part] = difference.square_().sum(dim=2)
        if self.self_retrieval:
            distances.masked_fill_(candidates == rows.unsqueeze(1), torch.inf)
        return distances

    def _rescan(self, rows: Tensor, k: int) -> Tensor:
        """(q, k) neighbours of the queries `rows` out of the whole gallery, however many ties there are at the k-th."""
        dim = self._gallery.dim
        queries = self._queries.at(rows, torch.float64)
        everything = torch.arange(len(self._gallery), device=rows.device)
        rough = torch.cat(
            [_square_distances(queries, self._gallery.at(block, torch.float64)) for block in _blocks(everything, dim)],
            dim=1,
        )
        if self.self_retrieval:
            rough.scatter_(1, rows.unsqueeze(1), torch.inf)
        # Twice: once for the k-th distance, once for the row compared with it.
        reach = rough.kthvalue(k, dim=1).values + 2 * _rounding(dim, torch.float64)
        neighbours = torch.empty(len(rows), k, dtype=torch.int64, device=rows.device)
        for i, near in enumerate(rough <= reach.unsqueeze(1)):
            candidates = near.nonzero().squeeze(1)
            distances = [self._distances(rows[i : i + 1], part.unsqueeze(0))[0] for part in _blocks(candidates, dim)]
            neighbours[i] = candidates[torch.cat(distances).sort(stable=True).indices[:k]]
        return neighbours


class _Rows:
    """Rows (n, D) as given, with their norms (n,) float64 and what they are divided by, first their norms.

    Args:
        name: the argument's name, for errors.
        values: (n, D).
        normalize: whether every row needs a direction.
    """

    def __init__(self, name: str, values: Tensor, normalize: bool):
        self.values = values
        self.dim = values.shape[1]
        # By blocks, so that the rows are never held in float64 as a whole.
        norms = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in _blocks(values, self.dim)]
        self.norms = torch.cat(norms)
        wrong = self.norms.isinf() | (self.norms == 0 if normalize else False)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            right = "positive and finite with normalize=True" if normalize else "finite"
            raise UserError(f"{name} must have rows whose norm is {right}, row {row} has norm {self.norms[row].item()}")
        self.divisor = self.norms.unsqueeze(1)

    def __len__(self) -> int:
        return len(self.values)

    def at(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Scaled rows (*index.shape, D), divided in float64, then rounded to `dtype`."""
        divisor = self.divisor[index] if self.divisor.ndim else self.divisor
        return self.values[index].double().div_(divisor).to(dtype)

    def all(self, dtype: torch.dtype) -> Tensor:
        """All scaled rows (n, D) in `dtype`."""
        scaled = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        for block in _blocks(torch.arange(len(self), device=self.values.device), self.dim):
            scaled[block] = self.at(block, dtype)
        return scaled


class _TorchCandidates:
    """Proposes candidates by products with the whole gallery, on the device of the embeddings."""

    def __init__(self, gallery: _Rows):
        self.dtype = torch.float32 if _float32_products_are_float32(gallery.values.device) else torch.float64
        self._gallery = gallery.all(self.dtype)

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The largest distance (q,) among the k nearest, and their indices (q, k), of queries (q, D)."""
        distances, indices = _square_distances(queries, self._gallery).topk(k, dim=1, largest=False)
        return distances[:, -1], indices


class _FaissCandidates:
    """Proposes candidates by faiss's flat index, on the CPU."""

    dtype = torch.float32

    def __init__(self, gallery: _Rows):
        import faiss

        self._index = faiss.IndexFlatL2(gallery.dim)
        self._index.add(gallery.all(torch.float32).cpu().numpy())

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `_TorchCandidates`."""
        distances, indices = self._index.search(queries.cpu().contiguous().numpy(), k)
        return torch.from_numpy(distances[:, -1]).to(queries.device), torch.from_numpy(indices).to(queries.device)


def _choose(backend: str, device: torch.device) -> str:
    """The backend that `backend` means for tensors on `device`; UserError for one that is not there."""
    if backend not in BACKENDS:
        raise UserError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        installed = importlib.util.find_spec("faiss") is not None
        return "faiss" if installed and device.type == "cpu" else "torch"
    if backend == "faiss":
        require("faiss", extra="faiss-cpu", purpose='backend="faiss"')
    return backend


def _square_distances(queries: Tensor, gallery: Tensor) -> Tensor:
    """(q, m) squared distances by products; wrong by at most `_rounding`."""
    squares = gallery.square().sum(dim=1)
    distances = torch.addmm(squares, queries, gallery.mT, alpha=-2)
    return distances.add_(queries.square().sum(dim=1, keepdim=True))


def _rounding(dim: int, dtype: torch.dtype) -> float:
    """A bound on the error of a squared distance of rows of norm at most 1, made of `dtype` products of `dim` channels.

    Each product of rows errs by (D + 2) u at most, whatever the order of its sum (Higham, Accuracy and Stability of
    Numerical Algorithms, 3.1), and each of the three additions by u, all times (|q| + |g|)^2 <= 4. The rest is for the
    second order and for the float64 distance it is compared with.
    """
    return 4.1 * (dim + 16) * torch.finfo(dtype).eps / 2


def _float32_products_are_float32(device: torch.device) -> bool:
    """Whether products of float32 matrices keep their precision under the settings in force (no TF32, no bfloat16)."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    return backend.fp32_precision in ("none", "ieee")


def _power_of_two(largest: float) -> float:
    """The power of two, thus an exact divisor, that brings a norm of `largest` to at most 1 (1 where all is zero)."""
    return 2.0 ** max(math.frexp(largest)[1], -1000)


def _blocks(rows: Tensor, elements: int) -> tuple[Tensor, ...]:
    """`rows` (n, ...) in pieces whose work, `elements` for a row, stays within `_BLOCK`."""
    return rows.split(max(1, _BLOCK // elements))
