"""Recall@K, Precision@K, MAP@K, R-Precision and MAP@R of an embedding.

Let a query's class have R other items in the gallery, and let right(i) be 1 if the i-th nearest item is of its class,
else 0. Then the metrics of the query are:

- Recall@K: 1 if any of the K nearest items is right, else 0;
- Precision@K: the share of the K nearest items that is right, (right(1) + … + right(K)) / K;
- MAP@K: 1 / min(R, K) times the sum over i = 1 … K of precision@i · right(i);
- R-Precision: Precision@R;
- MAP@R: 1 / R times the sum over i = 1 … R of precision@i · right(i).

Each metric is averaged over the queries with R > 0. Recall@K, R-Precision and MAP@R are those of Musgrave et al., "A
Metric Learning Reality Check" (ECCV 2020), section 3.2. MAP@K is divided by the most that K neighbors can reach, so
that 1 means perfect. pytorch-metric-learning divides it by R, and torchmetrics by the number of right items found. If K
is the whole gallery, the three agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.progress import Progress
from gcahng.retrieval.labels import check_labels
from gcahng.retrieval.plan import RetrievalPlan
from gcahng.retrieval.queries import QueryMetrics
from gcahng.retrieval.rows import check_embeddings, split


@dataclass(frozen=True)
class RetrievalResult:
    """Metrics over all queries, and over the queries of each class.

    Attributes:
        overall: what `retrieval_metrics` returns without `per_class`.
        per_class: for each label, the same metrics and the number of "queries" that count. A class is left out if none
            of its queries has a match.
    """

    overall: dict[str, float]
    per_class: dict[int, dict[str, float]]


@overload
def retrieval_metrics(embeddings: Tensor, labels: Tensor, *, per_class: Literal[False] = ..., **options) -> dict: ...


@overload
def retrieval_metrics(
    embeddings: Tensor, labels: Tensor, *, per_class: Literal[True], **options
) -> RetrievalResult: ...


# Fifteen arguments: this is the public function, and each keyword is a choice of its own. Inside the package,
# `RetrievalPlan` groups those that travel together.
def retrieval_metrics(
    embeddings: Tensor,
    labels: Tensor,
    *,
    metrics: Sequence[str] = ("recall", "map@r", "r_precision"),
    recall_at: Sequence[int] = (1, 2, 4, 8),
    precision_at: Sequence[int] = (1, 10),
    map_at: Sequence[int] = (10,),
    gallery_embeddings: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    normalize: bool = True,
    ties: str = "index",
    protocol: str = "exact",
    per_class: bool = False,
    backend: str = "auto",
    chunk: int = 1024,
    progress: Progress | None = None,
) -> dict[str, float] | RetrievalResult:
    """Compute retrieval metrics of `embeddings` among themselves, or as queries against a gallery.

    In self-retrieval, a query is removed from its own neighbors by its index, so a duplicate of it counts. The result
    depends on neither `backend` nor `chunk`.

    Args:
        embeddings: (n, D), any floating dtype.
        labels: (n,) integers; -1 for a row without a label, which matches no row, see `gcahng.retrieval.labels`.
        metrics: any of "recall", "precision", "map", "map@r" and "r_precision".
        recall_at: values of K for Recall@K. A K larger than the gallery means the whole gallery.
        precision_at: values of K for Precision@K. If K is larger than the gallery, the missing items count as wrong.
        map_at: values of K for MAP@K.
        gallery_embeddings: (m, D); None for self-retrieval.
        gallery_labels: (m,) integers, likewise; None for self-retrieval.
        normalize: search by cosine similarity. False searches by Euclidean distance between the rows as they are.
        ties: order of gallery rows at the same distance. "index" takes them in gallery order, "optimistic" puts the
            right ones first, "pessimistic" puts them last, and "expected" averages over all orders.
        protocol: "exact" for the definitions, or "official" for what the authors' evaluation computes, see
            `gcahng.retrieval.plan`.
        per_class: also return the metrics of each class.
        backend: "auto", "torch" or "faiss", see `gcahng.retrieval.nearest`.
        chunk: queries that are searched at once, fewer if a class is large. Memory is about chunk × min(m, 65,536)
            distances.
        progress: called with the queries done so far and the number that count.

    Returns:
        "recall@K", "precision@K" and "map@K" for each K, "map@r" and "r_precision", all as fractions. Also the number
        of "queries" that count, and of "queries_without_match", which are left out because the gallery has no item of
        their class (R = 0) or because they have no label. With `per_class`, a `RetrievalResult` whose `overall` is
        this.

    Raises:
        UserError: an argument has a wrong shape, type or range; a value is not finite; a row is zero with
            `normalize=True`; "faiss" is not installed; no query has a match; or, with "official", a query has none.
    """
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    plan = RetrievalPlan(metrics, recall_at, precision_at, map_at, ties, protocol, normalize)
    check_embeddings("embeddings", embeddings)
    labels = check_labels("labels", labels, embeddings)
    if (gallery_embeddings is None) != (gallery_labels is None):
        missing, given = "gallery_labels", "gallery_embeddings"
        if gallery_labels is not None:
            missing, given = given, missing
        raise UserError(f"{missing} is None; it must be given together with {given}")
    if gallery_embeddings is not None:
        check_embeddings("gallery_embeddings", gallery_embeddings, embeddings.shape[1])
        gallery_labels = check_labels("gallery_labels", gallery_labels, gallery_embeddings)
    queries = QueryMetrics(plan, embeddings, labels, gallery_embeddings, gallery_labels, backend)
    counted = queries.counted
    chunks = []
    for rows in split(counted, queries.chunk(chunk)):
        chunks.append(queries(rows))
        if progress is not None:
            progress(sum(map(len, chunks)), len(counted))
    values = torch.cat(chunks)
    overall = _means(plan.names, values) | {
        "queries": len(counted),
        "queries_without_match": len(labels) - len(counted),
    }
    return RetrievalResult(overall, _per_class(plan.names, values, labels[counted])) if per_class else overall


def _means(names: Sequence[str], values: Tensor) -> dict[str, float]:
    """The mean of each column of `values` (q, len(names)). The sums are exact, so chunks and threads do not matter."""
    return {name: math.fsum(column) / len(column) for name, column in zip(names, values.T.tolist(), strict=True)}


def _per_class(names: Sequence[str], values: Tensor, labels: Tensor) -> dict[int, dict[str, float]]:
    """`_means` over the queries of each label."""
    classes, sizes = labels.unique(return_counts=True)
    by_class = values[labels.argsort(stable=True)].split(sizes.tolist())
    return {
        label: _means(names, own) | {"queries": len(own)} for label, own in zip(classes.tolist(), by_class, strict=True)
    }
