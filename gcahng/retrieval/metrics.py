"""Recall@K, Precision@K, MAP@K, R-Precision and MAP@R of an embedding.

For a query whose class has R other items in the gallery, and right(i) = 1 if the i-th nearest is of its class, else 0:

- Recall@K: 1 if any of its K nearest is of its class, else 0;
- Precision@K: the part of its K nearest that is of its class, right(1) + ... + right(K) over K;
- MAP@K: (1 / min(R, K)) * sum over i = 1..K of precision@i * right(i);
- R-Precision: Precision@R;
- MAP@R: (1/R) * sum over i = 1..R of precision@i * right(i).

Each is the mean over the queries with R > 0. Recall@K, R-Precision and MAP@R are those of Musgrave et al., "A Metric
Learning Reality Check" (ECCV 2020), section 3.2. MAP@K is divided by the most that K neighbours can reach, so that 1
means perfect; pytorch-metric-learning divides it by R, torchmetrics by the right items found. With K the whole gallery
the three are the same.
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
from gcahng.retrieval.plan import RetrievalPlan
from gcahng.retrieval.queries import QueryMetrics
from gcahng.retrieval.rows import check_embeddings, split


@dataclass(frozen=True)
class RetrievalResult:
    """Metrics over all queries, and over the queries of each class.

    Attributes:
        overall: as `retrieval_metrics` returns them without `per_class`.
        per_class: by label, the same metrics and the number of "queries" counted; a class none of whose queries has a
            match is left out.
    """

    overall: dict[str, float]
    per_class: dict[int, dict[str, float]]


@overload
def retrieval_metrics(embeddings: Tensor, labels: Tensor, *, per_class: Literal[False] = ..., **options) -> dict: ...


@overload
def retrieval_metrics(
    embeddings: Tensor, labels: Tensor, *, per_class: Literal[True], **options
) -> RetrievalResult: ...


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
    """Retrieval metrics of `embeddings` among themselves, or of `embeddings` as queries against a gallery.

    In self-retrieval a query is left out of its own neighbours by its index, so that a duplicate of it counts. The
    result depends neither on `backend` nor on `chunk`.

    Args:
        embeddings: (n, D), any floating dtype.
        labels: (n,) integers.
        metrics: any of "recall", "precision", "map", "map@r" and "r_precision".
        recall_at: the K of Recall@K; a K beyond the gallery means all of it.
        precision_at: the K of Precision@K; what is missing beyond the gallery counts as wrong.
        map_at: the K of MAP@K.
        gallery_embeddings: (m, D), with `gallery_labels` (m,); None for self-retrieval.
        normalize: search by cosine similarity; False searches by Euclidean distance of the rows as they are.
        ties: how gallery rows at the same distance are ordered. "index": as they come; "optimistic" and "pessimistic":
            the right ones first or last; "expected": the mean over all orders.
        protocol: "exact" (the definitions), or "official", what the authors' evaluation does, see
            `gcahng.retrieval.plan`.
        per_class: also return the metrics of each class.
        backend: "auto", "torch" or "faiss", see `gcahng.retrieval.nearest`.
        chunk: queries searched at once, fewer where a class is large; memory is about chunk x min(m, 65,536).
        progress: called with the queries done so far and all that count.

    Returns:
        "recall@K", "precision@K" and "map@K" for each K, "map@r" and "r_precision" as fractions; as integers, the
        "queries" counted and the "queries_without_match", left out because the gallery holds no item of their class
        (R = 0). With `per_class`, a `RetrievalResult` that holds this as `overall`.

    Raises:
        UserError: an argument of a wrong shape, type or range; non-finite values; a zero row with `normalize=True`;
            "faiss" where it is not installed; no query with a match, or with "official" any query without.
    """
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    plan = RetrievalPlan(metrics, recall_at, precision_at, map_at, ties, protocol, normalize)
    check_embeddings("embeddings", embeddings)
    labels = check_labels("labels", labels, embeddings)
    if (gallery_embeddings is None) != (gallery_labels is None):
        missing = "gallery_labels" if gallery_labels is None else "gallery_embeddings"
        raise UserError(f"gallery_embeddings and gallery_labels go together, {missing} is None")
    if gallery_embeddings is not None:
        check_embeddings("gallery_embeddings", gallery_embeddings, embeddings.shape[1])
        gallery_labels = check_labels("gallery_labels", gallery_labels, gallery_embeddings)
    queries = QueryMetrics(plan, embeddings, labels, gallery_embeddings, gallery_labels, backend)
    counted = queries.counted
    found = []
    for rows in split(counted, queries.chunk(chunk)):
        found.append(queries(rows))
        if progress is not None:
            progress(sum(map(len, found)), len(counted))
    values = torch.cat(found)
    overall = _means(plan.names, values) | {
        "queries": len(counted),
        "queries_without_match": len(labels) - len(counted),
    }
    return RetrievalResult(overall, _per_class(plan.names, values, labels[counted])) if per_class else overall


def _means(names: Sequence[str], values: Tensor) -> dict[str, float]:
    """The mean of each column of `values` (q, len(names)), exactly summed: chunks and threads leave no trace."""
    return {name: math.fsum(column) / len(column) for name, column in zip(names, values.T.tolist(), strict=True)}


def _per_class(names: Sequence[str], values: Tensor, labels: Tensor) -> dict[int, dict[str, float]]:
    """`_means` over the queries of each label."""
    classes, sizes = labels.unique(return_counts=True)
    parts = values[labels.argsort(stable=True)].split(sizes.tolist())
    return {
        label: _means(names, part) | {"queries": len(part)} for label, part in zip(classes.tolist(), parts, strict=True)
    }


def check_labels(name: str, labels: Tensor, embeddings: Tensor) -> Tensor:
    """`labels` on the CPU as int64; UserError unless they are integers, one for each row of `embeddings`."""
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UserError(f"{name} must be integers, got {labels.dtype}")
    if labels.shape != embeddings.shape[:1]:
        raise UserError(f"{name} must have shape ({len(embeddings)},) like the embeddings, got {tuple(labels.shape)}")
    return labels.detach().cpu().long().contiguous()
