"""The metrics of single queries."""

from __future__ import annotations

import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.retrieval.labels import Classes
from gcahng.retrieval.neighbors import NeighborSearch, Ranking
from gcahng.retrieval.plan import OFFICIAL_DEPTH, RetrievalPlan
from gcahng.retrieval.ties import FirstMatch, first_match, gains, recall, tie_groups

# Ranked neighbors, or distances to right items, that are computed at once.
_AT_ONCE = 1 << 22


class QueryMetrics:
    """Computes the metrics of some queries at a time.

    Args:
        plan: the metrics and rules.
        embeddings: (n, D) the queries; they are the gallery too if `gallery` is None.
        labels: (n,) int64 on the CPU; -1 for no label, see `gcahng.retrieval.labels`.
        gallery: (m, D) or None.
        gallery_labels: (m,) int64 on the CPU, or None.
        backend: as in `gcahng.retrieval.nearest`.

    Attributes:
        counted: (q,) the queries with R > 0.

    Raises:
        UserError: no query has a match, or a query has none with the official protocol; or an argument is one that
            `NeighborSearch` refuses.
    """

    def __init__(
        self,
        plan: RetrievalPlan,
        embeddings: Tensor,
        labels: Tensor,
        gallery: Tensor | None,
        gallery_labels: Tensor | None,
        backend: str,
    ):
        self._plan = plan
        self._self_retrieval = gallery is None
        self._labels = labels
        self._gallery_labels = labels if gallery_labels is None else gallery_labels
        self._classes = Classes(self._gallery_labels)
        # A query without a label is in no class, so it is not there to be taken off.
        self._matches = (self._classes.sizes(labels) - int(self._self_retrieval)).clamp_min_(0)
        self.counted = self._matches.nonzero().squeeze(1)
        if not len(self.counted):
            raise UserError("labels has no query with another item of its class; it must have at least one")
        if plan.official and len(self.counted) < len(labels):
            first = int((self._matches == 0).nonzero()[0])
            raise UserError(
                f"labels has {len(labels) - len(self.counted)} queries without another item of their class, the first "
                f'in row {first}; it must have none with protocol="official"'
            )
        # Whether the first item of a ranking is dropped, instead of the query by its index.
        self._drops_first = plan.official and self._self_retrieval
        self._search = NeighborSearch(
            embeddings, gallery, normalize=plan.normalize, backend=backend, keep_self=self._drops_first
        )
        available = self._search.available - int(self._drops_first)
        self._depth = plan.depth(int(self._matches.max()), available)
        self._recall_ties = "optimistic" if plan.official and not self._self_retrieval else plan.ties
        limit = min(available, OFFICIAL_DEPTH) if self._drops_first else available
        self._cuts = [min(k, limit) for k in plan.recall_at]

    def chunk(self, wanted: int) -> int:
        """The number of queries to pass at once: `wanted`, or fewer if their rankings are long."""
        return min(wanted, max(1, _AT_ONCE // self._depth))

    def __call__(self, rows: Tensor) -> Tensor:
        """The metrics (q, len(plan.names)) float64 of the queries `rows` (q,)."""
        plan = self._plan
        ranking, left_out = self._ranked(rows)
        right = self._same_class(rows.unsqueeze(1), ranking.indices)
        groups = tie_groups(ranking.distances, right, ranking.beyond, ranking.beyond_right)
        columns = []
        if "recall" in plan.metrics:
            met, match = first_match(right, groups, self._recall_ties)
            if max(self._cuts) > self._depth and not met.all():
                unmet = met.logical_not().nonzero().squeeze(1)
                for field, counted in zip(match, self._count_before_match(rows[unmet], left_out[unmet]), strict=True):
                    field[unmet] = counted
                met[unmet] = True
            columns += [recall(match, k, self._recall_ties) * met for k in self._cuts]
        gain, precision_gain = gains(right, groups, plan.ties)
        matches = self._matches[rows]
        if "precision" in plan.metrics:
            columns += [gain[:, :k].sum(dim=1) / k for k in plan.precision_at]
        if "map" in plan.metrics:
            columns += [precision_gain[:, :k].sum(dim=1) / matches.clamp_max(k) for k in plan.map_at]
        within = torch.arange(self._depth) < matches.unsqueeze(1)
        if "map@r" in plan.metrics:
            columns.append((precision_gain * within).sum(dim=1) / matches)
        if "r_precision" in plan.metrics:
            columns.append((gain * within).sum(dim=1) / matches)
        return torch.stack(columns, dim=1)

    def _ranked(self, rows: Tensor) -> tuple[Ranking, Tensor]:
        """The rankings of the queries on the CPU, and the gallery row (q,) that each leaves out (-1: none)."""
        ranking = self._search.ranked(rows, self._depth + int(self._drops_first), self._same_class)
        ranking = Ranking(*(field.cpu() for field in ranking))
        if not self._drops_first:
            return ranking, rows if self._self_retrieval else torch.full_like(rows, -1)
        rest = Ranking(ranking.indices[:, 1:], ranking.distances[:, 1:], ranking.beyond, ranking.beyond_right)
        return rest, ranking.indices[:, 0]

    def _same_class(self, rows: Tensor, gallery_rows: Tensor) -> Tensor:
        """Whether queries and gallery rows are of the same class, pair by pair, on the device of the gallery rows."""
        return (self._labels[rows.cpu()] == self._gallery_labels[gallery_rows.cpu()]).to(gallery_rows.device)

    def _count_before_match(self, rows: Tensor, left_out: Tensor) -> FirstMatch:
        """Where the first match of each query stands, found by counting the rows that are nearer."""
        largest = int(self._classes.sizes(self._labels[rows]).max())
        size = max(1, _AT_ONCE // largest)
        chunks = zip(rows.split(size), left_out.split(size), strict=True)
        nearest = [self._nearest_match(*chunk) for chunk in chunks]
        target, target_index, tied_right = (torch.cat(field) for field in zip(*nearest, strict=True))
        standing = self._search.standing(rows, target, target_index, sorted(set(self._cuts)), left_out)
        # Ties are not counted if no K of Recall@K depends on them, so `tied` may be too small.
        tied = standing.tied.cpu().maximum(tied_right)
        return FirstMatch(standing.closer.cpu(), tied, tied_right, standing.tied_before.cpu())

    def _nearest_match(self, rows: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The distance (q,) of the nearest right item of each query, the first such item, and how many there are."""
        query, item = self._classes.members(self._labels[rows])
        counts = item != left_out[query]
        query, item = query[counts], item[counts]
        distances = self._search.pair_distances(rows[query], item).cpu()
        nearest = torch.full((len(rows),), torch.inf, dtype=torch.float64)
        nearest.scatter_reduce_(0, query, distances, "amin")
        is_nearest = distances == nearest[query]
        first = torch.full((len(rows),), len(self._gallery_labels))
        first.scatter_reduce_(0, query[is_nearest], item[is_nearest], "amin")
        return nearest, first, torch.zeros_like(first).index_add_(0, query, is_nearest.long())
