"""What is to be measured, and by which rules.

Protocol "exact" is the definitions of `gcahng.retrieval.metrics`. Protocol "official" is what the authors' evaluation
does, for comparison with published numbers; cosine similarity only:

- In self-retrieval, the first of a query's ranking is dropped, whoever it is, instead of the query by its index. A
  duplicate of the query with a smaller index is dropped in its place, and the query then counts as its own neighbor.
- Rankings end after 1,000 neighbors. A class with R > 1,000 loses what lies beyond in R-Precision and MAP@R, which
  still divide by R; in self-retrieval, Recall@K beyond K = 1,000 is Recall@1000.
- Against a gallery (In-Shop), Recall@K counts a query if fewer than K wrong items are strictly nearer than its nearest
  right one: a tie between the two is decided for the query. The other metrics take ties as everywhere.
- A query without a match has no value: the authors divide zero by zero there, here it is an error.

Where their code leaves the order of ties to the library, it is by index here. They compute similarities in float32, so
that neighbors closer than its rounding may be swapped; the order here is the exact one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gcahng.errors import UserError
from gcahng.retrieval.ties import TIES

METRICS = ("recall", "precision", "map", "map@r", "r_precision")
PROTOCOLS = ("exact", "official")

#: Neighbors in a ranking of the authors' evaluation.
OFFICIAL_DEPTH = 1000
# Recall@K up to this K is read from the ranking; beyond, the first match is counted out, which needs no sorted ranking.
_RANKED_RECALL = 32


@dataclass(frozen=True)
class RetrievalPlan:
    """The checked choices of `gcahng.retrieval.retrieval_metrics`, which explains them."""

    metrics: tuple[str, ...]
    recall_at: Sequence[int]
    precision_at: Sequence[int]
    map_at: Sequence[int]
    ties: str
    protocol: str
    normalize: bool

    def __post_init__(self):
        if not self.metrics or any(name not in METRICS for name in self.metrics):
            raise UserError(f"metrics must be some of {', '.join(METRICS)}, got {self.metrics!r}")
        for name in ("recall_at", "precision_at", "map_at"):
            object.__setattr__(self, name, _check_at(name, getattr(self, name)))
        if self.ties not in TIES:
            raise UserError(f"ties must be one of {', '.join(TIES)}, got {self.ties!r}")
        if self.protocol not in PROTOCOLS:
            raise UserError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {self.protocol!r}")
        if self.official and self.ties != "index":
            raise UserError(f'ties must be "index" with protocol="official", which has its own rule, got {self.ties!r}')
        if self.official and not self.normalize:
            raise UserError('normalize must be True with protocol="official", which is by cosine similarity, got False')

    @property
    def official(self) -> bool:
        return self.protocol == "official"

    @property
    def names(self) -> list[str]:
        """The metrics one by one, in the order of the columns that `QueryMetrics` gives."""
        at = {"recall": self.recall_at, "precision": self.precision_at, "map": self.map_at}
        names = [f"{name}@{k}" for name, ks in at.items() if name in self.metrics for k in ks]
        return names + [name for name in ("map@r", "r_precision") if name in self.metrics]

    def depth(self, largest: int, available: int) -> int:
        """Neighbors a query that have to be ranked, with at most `largest` right ones and `available` rows."""
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
    """The K of `at` without repetitions; UserError unless they are positive integers."""
    values = list(at) if isinstance(at, Sequence) else []
    if not values or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in values):
        raise UserError(f"{name} must be a sequence of positive integers, got {at!r}")
    return tuple(dict.fromkeys(values))
