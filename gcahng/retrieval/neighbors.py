"""Exact nearest neighbors: the same answer for every backend, chunk size and thread count.

The order is by squared Euclidean distance, summed channel by channel in float64, and by gallery index where two
distances are equal. On rows of norm 1 (`normalize=True`) that is the order of the cosine similarity.

A backend only proposes candidates, by float32 products. Their distances are then computed in float64, and a bound on
the rounding of the products tells whether a row left out could still belong to the neighbors. Where it could
(duplicates, ties, a collapsed embedding), the whole gallery is scanned again for that query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.retrieval.candidates import (
    FaissCandidates,
    TorchCandidates,
    choose_backend,
    rounding,
    square_distances,
)
from gcahng.retrieval.rows import Rows, blocks, check_embeddings, power_of_two, split

SameClass = Callable[[Tensor, Tensor], Tensor]

# Candidates beyond k: enough that distances past the k-th differ by more than float32 rounding, unless there are ties.
_MARGIN = 32
# Elements of pairs of rows at once: 2 MiB of float64, which stay in a core's cache from one operation to the next.
_IN_CACHE = 1 << 18
# Gallery rows at once where pairs in doubt are listed: in a collapsed embedding all of them are.
_DOUBT_WIDTH = 1 << 13


def nearest(
    embeddings: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    gallery_embeddings: Tensor | None = None,
    normalize: bool = True,
    backend: str = "auto",
    chunk: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The k nearest gallery rows of every query, nearest first; ties in the order of the gallery index.

    Without `gallery_embeddings` the gallery is `embeddings` itself, and a row is never its own neighbor: it is removed
    by its index, so that a duplicate of it stays.

    Args:
        embeddings: (n, D), any floating dtype.
        k: neighbors a query, at most the gallery rows there are to choose from.
        queries: (q,) indices of the rows to search for; all n by default.
        gallery_embeddings: (m, D), or None for self-retrieval.
        normalize: order by cosine similarity (rows scaled to norm 1); False orders by Euclidean distance of the rows as
            they are.
        backend: "torch" (on the device of the embeddings), "faiss" (on the CPU, or on a GPU where faiss has
            it), or "auto": faiss where it is installed for that device, torch otherwise. The result is the same.
        chunk: queries searched at once; memory is about chunk x min(m, 65,536).
        progress: called with the queries searched so far and all of them.

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
    search = NeighborSearch(embeddings, gallery_embeddings, normalize=normalize, backend=backend)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= search.available:
        raise UserError(f"k must be an integer in 1..{search.available} (the gallery rows to choose from), got {k!r}")
    found, done = [], 0
    for rows in split(queries, chunk):
        found.append(search.ranked(rows, k).indices)
        done += len(rows)
        if progress is not None:
            progress(done, len(queries))
    return torch.cat(found).to(embeddings.device) if found else torch.empty(0, k, dtype=torch.int64)


class Ranking(NamedTuple):
    """The k nearest of some queries, and who else is as near as the k-th.

    Attributes:
        indices: (q, k) int64 rows of the gallery, nearest first, ties by index.
        distances: (q, k) float64 squared distances.
        beyond: (q,) int64 rows left out that tie with the k-th.
        beyond_right: (q,) int64 how many of these are right (0 where the search was not told who is).
    """

    indices: Tensor
    distances: Tensor
    beyond: Tensor
    beyond_right: Tensor


class Standing(NamedTuple):
    """Where a gallery row stands in the ranking of a query.

    Attributes:
        closer: (q,) int64 rows nearer than it.
        tied: (q,) int64 rows at its distance, itself included.
        tied_before: (q,) int64 of these with a smaller index.
    """

    closer: Tensor
    tied: Tensor
    tied_before: Tensor


class NeighborSearch:
    """Searches one gallery again and again, always exactly (see `nearest`).

    Args:
        queries: (n, D). They are the gallery too where `gallery` is None.
        gallery: (m, D) or None.
        normalize, backend: as in `nearest`.
        keep_self: without `gallery`, whether a row may be its own neighbor.
    """

    def __init__(
        self,
        queries: Tensor,
        gallery: Tensor | None = None,
        *,
        normalize: bool = True,
        backend: str = "auto",
        keep_self: bool = False,
    ):
        check_embeddings("embeddings", queries)
        if gallery is not None:
            check_embeddings("gallery_embeddings", gallery, queries.shape[1])
            if gallery.device != queries.device:
                raise UserError(f"gallery_embeddings must be on {queries.device} like embeddings, got {gallery.device}")
        backend = choose_backend(backend, queries.device)
        # Only these devices have float64 for the exact distances.
        device = queries.device if queries.device.type in ("cpu", "cuda") else torch.device("cpu")
        self._without_self = gallery is None and not keep_self
        self._queries = Rows("embeddings", queries.detach().to(device), normalize)
        self._gallery = self._queries
        if gallery is not None:
            self._gallery = Rows("gallery_embeddings", gallery.detach().to(device), normalize)
        if not normalize:
            largest = max(self._queries.norms.max().item(), self._gallery.norms.max().item())
            divisor = torch.tensor(power_of_two(largest), dtype=torch.float64, device=device)
            self._queries.divisor = self._gallery.divisor = divisor
        #: Gallery rows that a query can be given.
        self.available = len(self._gallery) - int(self._without_self)
        self._propose = (FaissCandidates if backend == "faiss" else TorchCandidates)(self._gallery)

    @cached_property
    def _products(self) -> TorchCandidates:
        """Blocks of distances to the gallery, which faiss does not give."""
        return self._propose if isinstance(self._propose, TorchCandidates) else TorchCandidates(self._gallery)

    @torch.no_grad()
    def ranked(self, rows: Tensor, k: int, same_class: SameClass | None = None) -> Ranking:
        """The k <= `available` nearest of the queries `rows` (q,).

        Args:
            rows: (q,) indices of queries.
            k: neighbors a query.
            right: for queries (t,) and gallery rows (t,), which pairs (t,) are of one class; for `beyond_right`.
        """
        rows = rows.to(self._queries.values.device, torch.int64)
        k_own = k + int(self._without_self)
        k_candidates = min(k_own + _MARGIN, len(self._gallery))
        with torch.autocast(rows.device.type, enabled=False):
            rough, candidates = self._propose(self._queries.at(rows, self._propose.dtype), k_candidates)
        rough = rough.double()
        slack = rounding(self._gallery.dim, self._propose.dtype)
        # Rows farther than the k-th by more than both their errors are none of the k nearest.
        needed = rough <= rough[:, k_own - 1 : k_own] + 2 * slack
        candidates, order = candidates.sort(dim=1)
        needed, rough_by_index = needed.gather(1, order), rough.gather(1, order)
        distances = torch.full_like(rough, torch.inf)
        query, column = needed.nonzero(as_tuple=True)
        exact = self.pair_distances(rows[query], candidates[query, column])
        # Products less precise than promised, whatever computed them, are not relied on.
        off = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        off[query[(exact - rough_by_index[query, column]).abs() > slack]] = True
        distances[query, column] = exact
        if self._without_self:
            distances.masked_fill_(candidates == rows.unsqueeze(1), torch.inf)
        # The candidates are in the order of their index, so a stable sort leaves ties in that order.
        distances, order = distances.sort(dim=1, stable=True)
        candidates = candidates.gather(1, order)
        tied = distances[:, k:] == distances[:, k - 1 : k]
        beyond_right = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        if same_class is not None:
            query, column = tied.nonzero(as_tuple=True)
            beyond_right.index_add_(0, query, same_class(rows[query], candidates[query, k + column]).long())
        found = Ranking(candidates[:, :k], distances[:, :k], tied.sum(dim=1), beyond_right)
        if k_candidates < len(self._gallery):
            # A row that is no candidate is at least as far as the farthest candidate, but for rounding.
            off |= distances[:, k - 1] >= rough[:, -1] - slack
        for part in blocks(off.nonzero().squeeze(1), len(self._gallery)):
            for ours, theirs in zip(found, self._rescan(rows[part], k, same_class), strict=True):
                ours[part] = theirs
        return found

    @torch.no_grad()
    def standing(
        self, rows: Tensor, target: Tensor, target_index: Tensor, cuts: Sequence[int], left_out: Tensor
    ) -> Standing:
        """Where one gallery row for each of the queries `rows` stands, as exactly as `cuts` need.

        The whole gallery is compared by products. A query for which these leave open whether the target is among the
        K nearest, for some K of `cuts`, is compared again, with exact distances to the rows in doubt; of the others,
        the numbers are on the right side of every K, but not exact.

        Args:
            rows: (q,) indices of queries.
            target: (q,) float64 squared distances to the gallery rows in question.
            target_index: (q,) these rows.
            cuts: the K.
            left_out: (q,) for each query a gallery row that does not count, never the target; -1 for none.
        """
        device = self._queries.values.device
        rows, target, target_index, left_out = (x.to(device) for x in (rows, target, target_index, left_out))
        slack = rounding(self._gallery.dim, self._products.dtype)
        least, most = (torch.zeros(len(rows), dtype=torch.int64, device=device) for _ in range(2))
        low, high = ((target + d).to(self._products.dtype).unsqueeze(1) for d in (-slack, slack))
        below = None
        for _, distances in self._distances(rows, left_out):
            # Counted as numbers of their own type, which takes a third of the time of counting truth values.
            if below is None or below.shape != distances.shape:
                below = torch.empty_like(distances)
            least += torch.lt(distances, low, out=below).sum(dim=1).long()
            most += torch.le(distances, high, out=below).sum(dim=1).long()
        # Without the target itself, which is always below `high`.
        undecided = ((least.unsqueeze(1) < (k := torch.tensor(cuts, device=device))) & (most.unsqueeze(1) > k)).any(1)
        found = Standing(least, torch.ones_like(least), torch.zeros_like(least))
        part = undecided.nonzero().squeeze(1)
        if len(part):
            exact = self._exact_standing(rows[part], target[part], target_index[part], left_out[part])
            for ours, theirs in zip(found, exact, strict=True):
                ours[part] = theirs
        return found

    @torch.no_grad()
    def pair_distances(self, rows: Tensor, gallery_rows: Tensor) -> Tensor:
        """(t,) float64 exact squared distances of queries `rows` (t,) to gallery rows (t,), pair by pair."""
        device = self._queries.values.device
        rows, gallery_rows = rows.to(device), gallery_rows.to(device)
        distances = torch.empty(len(rows), dtype=torch.float64, device=device)
        for part in blocks(torch.arange(len(rows), device=device), self._gallery.dim, _IN_CACHE):
            difference = self._gallery.at(gallery_rows[part], torch.float64)
            difference -= self._queries.at(rows[part], torch.float64)
            distances[part] = difference.square_().sum(dim=1)
        return distances

    def _distances(self, rows: Tensor, left_out: Tensor, width: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Blocks of distances by products, infinite to the gallery row that is left out (-1: none)."""
        every = torch.arange(len(rows), device=rows.device)
        # Autocast leaves these products alone, as all that write into memory they are given.
        for start, distances in self._products.distances(self._queries.at(rows, self._products.dtype), width):
            inside = (left_out >= start) & (left_out < start + distances.shape[1])
            distances[every[inside], left_out[inside] - start] = torch.inf
            yield start, distances

    def _exact_standing(self, rows: Tensor, target: Tensor, target_index: Tensor, left_out: Tensor) -> Standing:
        slack = rounding(self._gallery.dim, self._products.dtype)
        found = Standing(*(torch.zeros(len(rows), dtype=torch.int64, device=rows.device) for _ in range(3)))
        low, high = ((target + d).to(self._products.dtype).unsqueeze(1) for d in (-slack, slack))
        for start, distances in self._distances(rows, left_out, _DOUBT_WIDTH):
            below = distances < low
            found.closer.add_(below.sum(dim=1))
            query, column = ((distances <= high) & ~below).nonzero(as_tuple=True)
            gallery_row = column + start
            exact = self.pair_distances(rows[query], gallery_row)
            tied = exact == target[query]
            before = tied & (gallery_row < target_index[query])
            for count, which in zip(found, (exact < target[query], tied, before), strict=True):
                count.index_add_(0, query, which.long())
        return found

    def _rescan(self, rows: Tensor, k: int, same_class: SameClass | None) -> Ranking:
        """`ranked` out of the whole gallery, however many ties there are at the k-th."""
        dim = self._gallery.dim
        queries = self._queries.at(rows, torch.float64)
        everything = torch.arange(len(self._gallery), device=rows.device)
        rough = torch.cat(
            [square_distances(queries, self._gallery.at(block, torch.float64)) for block in blocks(everything, dim)],
            dim=1,
        )
        if self._without_self:
            rough.scatter_(1, rows.unsqueeze(1), torch.inf)
        # Twice: once for the k-th distance, once for the row compared with it.
        reach = rough.kthvalue(k, dim=1).values + 2 * rounding(dim, torch.float64)
        found = Ranking(
            torch.empty(len(rows), k, dtype=torch.int64, device=rows.device),
            torch.empty(len(rows), k, dtype=torch.float64, device=rows.device),
            *(torch.zeros(len(rows), dtype=torch.int64, device=rows.device) for _ in range(2)),
        )
        for i, near in enumerate(rough <= reach.unsqueeze(1)):
            candidates = near.nonzero().squeeze(1)
            row = rows[i].expand(len(candidates))
            distances, order = self.pair_distances(row, candidates).sort(stable=True)
            candidates = candidates[order]
            found.indices[i], found.distances[i] = candidates[:k], distances[:k]
            tied = candidates[k:][distances[k:] == distances[k - 1]]
            found.beyond[i] = len(tied)
            if same_class is not None:
                found.beyond_right[i] = same_class(row[: len(tied)], tied).sum()
        return found
