"""Exact nearest neighbors: the same result for every backend, chunk size and number of threads.

Neighbors are ordered by squared Euclidean distance, summed channel by channel in float64, and by gallery index if two
distances are equal. For rows of norm 1 (`normalize=True`) this is the order of the cosine similarity.

A backend only proposes candidates from float32 products. Their distances are then computed in float64. A bound on the
rounding of the products shows whether a row that was left out could still be a neighbor. If it could (because of
duplicates, ties or a collapsed embedding), the whole gallery is scanned again for that query.
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
from gcahng.retrieval.rows import Rows, blocks, check_embeddings, dtype_name, power_of_two, split

# For queries (t,) and gallery rows (t,): which pairs (t,) are of the same class.
SameClass = Callable[[Tensor, Tensor], Tensor]

# Candidates beyond k. With so many, the last one is farther than the k-th by more than float32 rounding, unless there
# are ties.
_MARGIN = 32
# Elements of pairs of rows that are compared at once: 2 MiB of float64, which stay in a core's cache.
_IN_CACHE = 1 << 18
# Gallery rows that are compared at once when pairs in doubt are listed. In a collapsed embedding these are all pairs.
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
    """Find the k nearest gallery rows of every query, nearest first. Ties are in the order of the gallery.

    Without `gallery_embeddings`, the gallery is `embeddings` itself, and a row is never its own neighbor. It is removed
    by its index, so a duplicate of it remains.

    Args:
        embeddings: (n, D), any floating dtype.
        k: neighbors per query, at most the number of gallery rows to choose from.
        queries: (q,) indices of the rows to search for; None means all n.
        gallery_embeddings: (m, D); None for self-retrieval.
        normalize: order by cosine similarity, that is, scale rows to norm 1. False orders by Euclidean distance between
            the rows as they are.
        backend: "torch" on the device of the embeddings; "faiss" on a GPU if faiss supports it, else on the CPU; or
            "auto", which is faiss if it is installed for that device, else torch. The result is the same.
        chunk: queries that are searched at once. Memory is about chunk × min(m, 65,536) distances.
        progress: called with the queries searched so far and in total.

    Returns:
        (q, k) int64 gallery indices, on the device of `embeddings`.

    Raises:
        UserError: an argument has a wrong shape, type or range; a value is not finite; a row is zero with
            `normalize=True`; or "faiss" is not installed.
    """
    check_embeddings("embeddings", embeddings)
    if queries is None:
        queries = torch.arange(len(embeddings))
    elif queries.ndim != 1 or queries.dtype not in (torch.int64, torch.int32):
        raise UserError(
            f"queries is {dtype_name(queries)} of shape {tuple(queries.shape)}; it must be int64 or int32 row indices "
            "of shape (q,)"
        )
    elif len(queries) and not 0 <= int(queries.min()) <= int(queries.max()) < len(embeddings):
        raise UserError(
            f"queries has values from {int(queries.min())} to {int(queries.max())}; they must be from 0 to "
            f"{len(embeddings) - 1}"
        )
    search = NeighborSearch(embeddings, gallery_embeddings, normalize=normalize, backend=backend)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= search.available:
        raise UserError(
            f"k is {k!r}; it must be an integer from 1 to {search.available}, the number of gallery rows to choose from"
        )
    neighbors, done = [], 0
    for rows in split(queries, chunk):
        neighbors.append(search.ranked(rows, k).indices)
        done += len(rows)
        if progress is not None:
            progress(done, len(queries))
    return torch.cat(neighbors).to(embeddings.device) if neighbors else torch.empty(0, k, dtype=torch.int64)


class Ranking(NamedTuple):
    """The k nearest gallery rows of some queries, and how many more are as near as the k-th.

    Attributes:
        indices: (q, k) int64 gallery rows, nearest first, ties in the order of the gallery.
        distances: (q, k) float64 squared distances.
        beyond: (q,) int64 number of further rows that tie with the k-th.
        beyond_right: (q,) int64 how many of these are of the query's class; 0 if classes were not given.
    """

    indices: Tensor
    distances: Tensor
    beyond: Tensor
    beyond_right: Tensor


class Standing(NamedTuple):
    """Where a gallery row stands in the ranking of a query.

    Attributes:
        closer: (q,) int64 number of rows that are nearer.
        tied: (q,) int64 number of rows at the same distance, itself included.
        tied_before: (q,) int64 how many of these have a smaller index.
    """

    closer: Tensor
    tied: Tensor
    tied_before: Tensor


class NeighborSearch:
    """Searches a gallery many times, always exactly (see `nearest`).

    Args:
        queries: (n, D); they are the gallery too if `gallery` is None.
        gallery: (m, D) or None.
        normalize: as in `nearest`.
        backend: as in `nearest`.
        keep_self: whether a row may be its own neighbor if there is no `gallery`.

    Attributes:
        available: number of gallery rows that a query can be given.

    Raises:
        UserError: an argument has a wrong shape, type or device, a value is not finite, a row is zero with `normalize`,
            or the backend is not installed.
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
                raise UserError(
                    f"gallery_embeddings is on {gallery.device}; it must be on {queries.device}, like embeddings"
                )
        backend = choose_backend(backend, queries.device)
        # The exact distances need float64, which only these devices have.
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
        self.available = len(self._gallery) - int(self._without_self)
        self._propose = (FaissCandidates if backend == "faiss" else TorchCandidates)(self._gallery)

    @cached_property
    def _products(self) -> TorchCandidates:
        """Distances to the whole gallery in blocks, which faiss does not provide."""
        return self._propose if isinstance(self._propose, TorchCandidates) else TorchCandidates(self._gallery)

    @torch.no_grad()
    def ranked(self, rows: Tensor, k: int, same_class: SameClass | None = None) -> Ranking:
        """Rank the nearest gallery rows of some queries.

        Args:
            rows: (q,) indices of queries.
            k: neighbors per query, at most `available`.
            same_class: says which pairs are of the same class, for `Ranking.beyond_right`.
        """
        rows = rows.to(self._queries.values.device, torch.int64)
        k_own = k + int(self._without_self)
        k_candidates = min(k_own + _MARGIN, len(self._gallery))
        with torch.autocast(rows.device.type, enabled=False):
            rough, candidates = self._propose(self._queries.at(rows, self._propose.dtype), k_candidates)
        rough = rough.double()
        slack = rounding(self._gallery.dim, self._propose.dtype)
        # A row that is farther than the k-th by more than the errors of both cannot be one of the k nearest.
        needed = rough <= rough[:, k_own - 1 : k_own] + 2 * slack
        candidates, order = candidates.sort(dim=1)
        needed, rough_by_index = needed.gather(1, order), rough.gather(1, order)
        distances = torch.full_like(rough, torch.inf)
        query, column = needed.nonzero(as_tuple=True)
        exact = self.pair_distances(rows[query], candidates[query, column])
        # Queries to scan again. One reason is products that are less precise than the bound says, whatever the cause.
        doubtful = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        doubtful[query[(exact - rough_by_index[query, column]).abs() > slack]] = True
        distances[query, column] = exact
        if self._without_self:
            distances.masked_fill_(candidates == rows.unsqueeze(1), torch.inf)
        # The candidates are in gallery order, and a stable sort leaves ties in that order.
        distances, order = distances.sort(dim=1, stable=True)
        candidates = candidates.gather(1, order)
        tied = distances[:, k:] == distances[:, k - 1 : k]
        beyond_right = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        if same_class is not None:
            query, column = tied.nonzero(as_tuple=True)
            beyond_right.index_add_(0, query, same_class(rows[query], candidates[query, k + column]).long())
        ranking = Ranking(candidates[:, :k], distances[:, :k], tied.sum(dim=1), beyond_right)
        if k_candidates < len(self._gallery):
            # Up to rounding, any other row is at least as far as the farthest candidate.
            doubtful |= distances[:, k - 1] >= rough[:, -1] - slack
        for again in blocks(doubtful.nonzero().squeeze(1), len(self._gallery)):
            for field, exact_field in zip(ranking, self._rescan(rows[again], k, same_class), strict=True):
                field[again] = exact_field
        return ranking

    @torch.no_grad()
    def standing(
        self, rows: Tensor, target: Tensor, target_index: Tensor, cuts: Sequence[int], left_out: Tensor
    ) -> Standing:
        """Find where one gallery row for each query stands in its ranking, as exactly as `cuts` require.

        The whole gallery is compared by products. For some queries these leave open whether the target is among the K
        nearest, for a K of `cuts`. Such a query is compared again, with exact distances to the rows in doubt. For the
        others the counts are on the right side of every K, but not exact.

        Args:
            rows: (q,) indices of queries.
            target: (q,) float64 squared distances to the gallery rows in question.
            target_index: (q,) these gallery rows.
            cuts: the values of K.
            left_out: (q,) a gallery row for each query that does not count, never the target; -1 for none.
        """
        device = self._queries.values.device
        rows, target, target_index, left_out = (tensor.to(device) for tensor in (rows, target, target_index, left_out))
        slack = rounding(self._gallery.dim, self._products.dtype)
        least, most = (torch.zeros(len(rows), dtype=torch.int64, device=device) for _ in range(2))
        low, high = ((target + error).to(self._products.dtype).unsqueeze(1) for error in (-slack, slack))
        below = None
        for _, distances in self._distances(rows, left_out):
            # Counting in the dtype of the distances takes a third of the time of counting booleans.
            if below is None or below.shape != distances.shape:
                below = torch.empty_like(distances)
            least += torch.lt(distances, low, out=below).sum(dim=1).long()
            most += torch.le(distances, high, out=below).sum(dim=1).long()
        # `most` includes the target itself, which is always below `high`.
        undecided = ((least.unsqueeze(1) < (k := torch.tensor(cuts, device=device))) & (most.unsqueeze(1) > k)).any(1)
        standing = Standing(least, torch.ones_like(least), torch.zeros_like(least))
        again = undecided.nonzero().squeeze(1)
        if len(again):
            exact = self._exact_standing(rows[again], target[again], target_index[again], left_out[again])
            for field, exact_field in zip(standing, exact, strict=True):
                field[again] = exact_field
        return standing

    @torch.no_grad()
    def pair_distances(self, rows: Tensor, gallery_rows: Tensor) -> Tensor:
        """The exact squared distances (t,) float64 between queries `rows` (t,) and gallery rows (t,), pair by pair."""
        device = self._queries.values.device
        rows, gallery_rows = rows.to(device), gallery_rows.to(device)
        distances = torch.empty(len(rows), dtype=torch.float64, device=device)
        for pairs in blocks(torch.arange(len(rows), device=device), self._gallery.dim, _IN_CACHE):
            difference = self._gallery.at(gallery_rows[pairs], torch.float64)
            difference -= self._queries.at(rows[pairs], torch.float64)
            distances[pairs] = difference.square_().sum(dim=1)
        return distances

    def _distances(self, rows: Tensor, left_out: Tensor, width: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield blocks of distances from products. That to the gallery row that is left out (-1: none) is infinite."""
        every = torch.arange(len(rows), device=rows.device)
        # Autocast does not change products that write into a given tensor, as these do.
        for start, distances in self._products.distances(self._queries.at(rows, self._products.dtype), width):
            inside = (left_out >= start) & (left_out < start + distances.shape[1])
            distances[every[inside], left_out[inside] - start] = torch.inf
            yield start, distances

    def _exact_standing(self, rows: Tensor, target: Tensor, target_index: Tensor, left_out: Tensor) -> Standing:
        slack = rounding(self._gallery.dim, self._products.dtype)
        standing = Standing(*(torch.zeros(len(rows), dtype=torch.int64, device=rows.device) for _ in range(3)))
        low, high = ((target + error).to(self._products.dtype).unsqueeze(1) for error in (-slack, slack))
        for start, distances in self._distances(rows, left_out, _DOUBT_WIDTH):
            below = distances < low
            standing.closer.add_(below.sum(dim=1))
            query, column = ((distances <= high) & ~below).nonzero(as_tuple=True)
            gallery_row = column + start
            exact = self.pair_distances(rows[query], gallery_row)
            tied = exact == target[query]
            before = tied & (gallery_row < target_index[query])
            for count, counted in zip(standing, (exact < target[query], tied, before), strict=True):
                count.index_add_(0, query, counted.long())
        return standing

    def _rescan(self, rows: Tensor, k: int, same_class: SameClass | None) -> Ranking:
        """The same as `ranked`, from the whole gallery, for any number of ties with the k-th."""
        dim = self._gallery.dim
        queries = self._queries.at(rows, torch.float64)
        all_rows = torch.arange(len(self._gallery), device=rows.device)
        rough = torch.cat(
            [square_distances(queries, self._gallery.at(block, torch.float64)) for block in blocks(all_rows, dim)],
            dim=1,
        )
        if self._without_self:
            rough.scatter_(1, rows.unsqueeze(1), torch.inf)
        # Twice the error, of the k-th distance and of the row that is compared with it.
        reach = rough.kthvalue(k, dim=1).values + 2 * rounding(dim, torch.float64)
        ranking = Ranking(
            torch.empty(len(rows), k, dtype=torch.int64, device=rows.device),
            torch.empty(len(rows), k, dtype=torch.float64, device=rows.device),
            *(torch.zeros(len(rows), dtype=torch.int64, device=rows.device) for _ in range(2)),
        )
        for i, near in enumerate(rough <= reach.unsqueeze(1)):
            candidates = near.nonzero().squeeze(1)
            row = rows[i].expand(len(candidates))
            distances, order = self.pair_distances(row, candidates).sort(stable=True)
            candidates = candidates[order]
            ranking.indices[i], ranking.distances[i] = candidates[:k], distances[:k]
            tied = candidates[k:][distances[k:] == distances[k - 1]]
            ranking.beyond[i] = len(tied)
            if same_class is not None:
                ranking.beyond_right[i] = same_class(row[: len(tied)], tied).sum()
        return ranking
