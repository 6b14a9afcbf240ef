"""Recall@K, MAP@R and R-Precision of an embedding.

Definitions as in Musgrave et al., "A Metric Learning Reality Check" (ECCV 2020), section 3.2. For a query whose class
has R other items in the gallery:

- Recall@K: 1 if any of its K nearest is of its class, else 0;
- R-Precision: the part of its R nearest that is of its class;
- MAP@R: (1/R) * sum over i = 1..R of precision@i * right(i), right(i) = 1 if the i-th nearest is of its class.

Each is the mean over the queries with R > 0.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.retrieval.neighbours import NeighbourSearch
from gcahng.retrieval.rows import check_embeddings, split


def retrieval_metrics(
    embeddings: Tensor,
    labels: Tensor,
    *,
    recall_at: Sequence[int] = (1, 2, 4, 8),
    gallery_embeddings: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    normalize: bool = True,
    backend: str = "auto",
    chunk: int = 1024,
) -> dict[str, float]:
    """Retrieval metrics of `embeddings` among themselves, or of `embeddings` as queries against a gallery.

    In self-retrieval a query is left out of its own neighbours by its index, so that a duplicate of it counts. Ties are
    broken by gallery index. The result depends neither on `backend` nor on `chunk`.

    Args:
        embeddings: (n, D), any floating dtype.
        labels: (n,) integers.
        recall_at: the K of Recall@K; a K beyond the gallery means all of it.
        gallery_embeddings: (m, D), with `gallery_labels` (m,); None for self-retrieval.
        normalize: search by cosine similarity; False searches by Euclidean distance of the rows as they are.
        backend: "auto", "torch" or "faiss", see `gcahng.retrieval.nearest`.
        chunk: queries searched at once; memory is about chunk x gallery.

    Returns:
        "recall@K" for each K, "map@r" and "r_precision" as fractions; as integers, the "queries" counted and the
        "queries_without_match", left out because the gallery holds no item of their class (R = 0).

    Raises:
        UserError: an argument of a wrong shape, type or range; non-finite values; a zero row with `normalize=True`;
            "faiss" where it is not installed; no query with a match.
    """
    recall_at = _check_recall_at(recall_at)
    check_embeddings("embeddings", embeddings)
    labels = _check_labels("labels", labels, embeddings)
    if (gallery_embeddings is None) != (gallery_labels is None):
        missing = "gallery_labels" if gallery_labels is None else "gallery_embeddings"
        raise UserError(f"gallery_embeddings and gallery_labels go together, {missing} is None")
    if gallery_labels is None:
        gallery_labels = labels
    else:
        check_embeddings("gallery_embeddings", gallery_embeddings, embeddings.shape[1])
        gallery_labels = _check_labels("gallery_labels", gallery_labels, gallery_embeddings)

    matches = _class_sizes(labels, gallery_labels) - int(gallery_embeddings is None)
    counted = matches.nonzero().squeeze(1)
    if not len(counted):
        raise UserError("labels must give some query another item of its class to find, all have R = 0")
    search = NeighbourSearch(embeddings, gallery_embeddings, normalize=normalize, backend=backend)
    k = min(max(*recall_at, int(matches.max())), search.available)
    per_query = [
        _per_query(
            gallery_labels[search.ranked(rows, k).indices.cpu()] == labels[rows].unsqueeze(1), matches[rows], recall_at
        )
        for rows in split(counted, chunk)
    ]
    # Exact sums: chunks and threads leave no trace in the last bits.
    means = [math.fsum(column) / len(counted) for column in torch.cat(per_query).T.tolist()]
    names = [f"recall@{k}" for k in recall_at] + ["map@r", "r_precision"]
    return dict(zip(names, means, strict=True)) | {
        "queries": len(counted),
        "queries_without_match": len(labels) - len(counted),
    }


def _per_query(right: Tensor, matches: Tensor, recall_at: Sequence[int]) -> Tensor:
    """Columns Recall@K..., MAP@R, R-Precision (q, len(recall_at) + 2) float64.

    Args:
        right: (q, k) whether the i-th nearest is of the query's class.
        matches: (q,) R > 0.
        recall_at: the K.
    """
    recall = [right[:, :k].any(dim=1).double() for k in recall_at]
    rank = torch.arange(1, right.shape[1] + 1)
    right = right & (rank <= matches.unsqueeze(1))
    precision = right.cumsum(dim=1).double() / rank
    return torch.stack([*recall, (precision * right).sum(dim=1) / matches, right.sum(dim=1).double() / matches], dim=1)


def _class_sizes(labels: Tensor, gallery_labels: Tensor) -> Tensor:
    """(n,) how many gallery items have each label of `labels` (n,)."""
    classes, sizes = gallery_labels.unique(return_counts=True)
    place = torch.searchsorted(classes, labels).clamp_(max=len(classes) - 1)
    return torch.where(classes[place] == labels, sizes[place], 0)


def _check_labels(name: str, labels: Tensor, embeddings: Tensor) -> Tensor:
    """`labels` on the CPU as int64; UserError unless they are integers, one for each row of `embeddings`."""
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UserError(f"{name} must be integers, got {labels.dtype}")
    if labels.shape != embeddings.shape[:1]:
        raise UserError(f"{name} must have shape ({len(embeddings)},) like the embeddings, got {tuple(labels.shape)}")
    return labels.detach().cpu().long()


def _check_recall_at(recall_at: Sequence[int]) -> list[int]:
    """The K of `recall_at` without repetitions; UserError unless they are positive integers."""
    values = list(recall_at) if isinstance(recall_at, Sequence) else []
    if not values or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in values):
        raise UserError(f"recall_at must be a sequence of positive integers, got {recall_at!r}")
    return list(dict.fromkeys(values))
