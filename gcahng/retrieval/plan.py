"""Which metrics to compute, and by which rules.

The protocol "exact" follows the definitions in `gcahng.retrieval.metrics`. The protocol "official" does what the
authors' evaluation does, to compare with published numbers. It supports cosine similarity only:

- In self-retrieval, the first item of a ranking is dropped, whatever it is, instead of the query by its index. A
  duplicate of the query with a smaller index is dropped in its place, and the query then counts as its own neighbor.
- Rankings end after 1,000 neighbors. R-Precision and MAP@R of a class with R > 1,000 lose what comes after, but still
  divide by R. In self-retrieval, Recall@K with K > 1,000 is Recall@1000.
- Against a gallery (In-Shop), Recall@K counts a query if fewer than K wrong items are strictly nearer than its nearest
  right one. So a tie between the two counts for the query. The other metrics treat ties as usual.
- A query without a match has no value. The authors divide zero by zero there; here it is an error.

Their code leaves the order of ties to a library; here it is the order of the gallery. They compute similarities in
float32, so neighbors that are closer than its rounding may be swapped; here the order is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gcahng.bounds import check_number
from gcahng.errors import UserError
from gcahng.retrieval.ties import TIES

METRICS = ("recall", "precision", "map", "map@r", "r_precision")
PROTOCOLS = ("exact", "official")

# Neighbors in a ranking of the authors' evaluation.
OFFICIAL_DEPTH = 1000
# Recall@K up to this K is read from the ranking. For a larger K, the rows before the first match are counted, which
# needs no sorted ranking.
_RANKED_RECALL = 32


@dataclass(frozen=True)
class RetrievalPlan:
    """The options of `gcahng.retrieval.retrieval_metrics`, which explains them, after checking.

    Raises:
        UserError: an option is out of range, or two do not fit together.
    """

    metrics: tuple[str, ...]
    recall_at: Sequence[int]
    precision_at: Sequence[int]
    map_at: Sequence[int]
    ties: str
    protocol: str
    normalize: bool

    def __post_init__(self):
        if not self.metrics or any(name not in METRICS for name in self.metrics):
            raise UserError(f"metrics is {self.metrics!r}; it must be one or more of {', '.join(METRICS)}")
        for name in ("recall_at", "precision_at", "map_at"):
            object.__setattr__(self, name, _check_at(name, getattr(self, name)))
        if self.ties not in TIES:
            raise UserError(f"ties is {self.ties!r}; it must be one of {', '.join(TIES)}")
        if self.protocol not in PROTOCOLS:
            raise UserError(f"protocol is {self.protocol!r}; it must be one of {', '.join(PROTOCOLS)}")
        if self.official and self.ties != "index":
            raise UserError(
                f'ties is {self.ties!r}; it must be "index" with protocol="official", which has its own rule'
            )
        if self.official and not self.normalize:
            raise UserError(
                'normalize is False; it must be True with protocol="official", which uses cosine similarity'
            )

    @property
    def official(self) -> bool:
        return self.protocol == "official"

    @property
    def names(self) -> list[str]:
        """The names of the metrics, in the order of the columns that `QueryMetrics` returns."""
        at = {"recall": self.recall_at, "precision": self.precision_at, "map": self.map_at}
        names = [f"{name}@{k}" for name, ks in at.items() if name in self.metrics for k in ks]
        return names + [name for name in ("map@r", "r_precision") if name in self.metrics]

    def depth(self, largest: int, available: int) -> int:
        """The number of neighbors per query that have to be ranked.

        Args:
            largest: largest number of right items of any query.
            available: number of gallery rows that a query can be given.
        """
        depth = 1
        if "map@r" in self.metrics or "r_precision" in self.metrics:
            depth = largest
        if "precision" in self.metrics:
            depth = max(depth, *self.precision_at)
        if "map" in self.metrics:
            depth = max(depth, *self.map_at)
        if "recall" in self.metrics:
            depth = max(depth, *(k for k in (0, *self.recall_at) if k <= _RANKED_RECALL))
        return min(depth, available, *([OFFICIAL_DEPTH] if self.official else []))


def _check_at(name: str, at: Sequence[int]) -> tuple[int, ...]:
    """The values of K without repetitions; UserError if they are not positive integers."""
    values = list(at) if isinstance(at, Sequence) else []
    if not values or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in values):
        raise UserError(f"{name} is {at!r}; it must be a sequence of positive integers")
    for value in values:
        check_number(name, value)
    return tuple(dict.fromkeys(values))
