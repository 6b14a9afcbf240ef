"""NMI and AMI: how well k-means of the embeddings recovers the classes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gcahng.bounds import check_number
from gcahng.data.sampler import UNLABELED
from gcahng.errors import UserError
from gcahng.extras import faiss_missing, require, require_faiss
from gcahng.retrieval.candidates import faiss_sees_gpus, warn_once_without_faiss
from gcahng.retrieval.index_base import prepared
from gcahng.retrieval.labels import check_labels
from gcahng.retrieval.rows import check_embeddings

BACKENDS = ("auto", "faiss", "scikit-learn")

# The default of faiss, and of pytorch-metric-learning.
_ITERATIONS = 25


def clustering_metrics(
    embeddings: Tensor,
    labels: Tensor,
    *,
    clusters: int | None = None,
    normalize: bool = True,
    seed: int = 0,
    iterations: int = _ITERATIONS,
    backend: str = "auto",
) -> dict[str, float]:
    """Normalized and adjusted mutual information between the classes and the clusters that k-means finds.

    Both divide by the arithmetic mean of the two entropies. NMI grows with the number of clusters, even of random ones.
    AMI subtracts what random clusters of the same sizes are expected to reach. k-means starts from random rows, so the
    numbers vary with `seed` and between backends.

    Args:
        embeddings: (n, D), any floating dtype.
        labels: (n,) integers; rows with -1 have no label and take no part.
        clusters: number of clusters; None means the number of classes.
        normalize: scale rows to norm 1 before clustering.
        seed: seed of the rows that k-means starts from.
        iterations: most iterations of k-means.
        backend: implementation of k-means, "faiss", "scikit-learn", or "auto", which is faiss if it is installed.

    Returns:
        "nmi", "ami" and the number of "clusters".

    Raises:
        UserError: an argument has a wrong shape, type or range; a value is not finite; a row is zero with
            `normalize=True`; or scikit-learn, which computes the scores, or the backend is not installed.
    """
    check_embeddings("embeddings", embeddings)
    labels = check_labels("labels", labels, embeddings)
    known = labels != UNLABELED
    if not known.all():
        if not known.any():
            raise UserError("labels is -1 for every row, which means no label; it must name the class of at least one")
        embeddings, labels = embeddings[known.to(embeddings.device)], labels[known]
    if clusters is None:
        clusters = len(labels.unique())
    for name, value, least, most in (
        ("clusters", clusters, 1, len(labels)),
        ("iterations", iterations, 1, 1_000_000),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UserError(f"{name} is {value!r}; it must be an integer from {least} to {most}")
    check_number("seed", seed, key="k-means seed")
    kmeans = _faiss_kmeans if _choose(backend) == "faiss" else _sklearn_kmeans
    rows = torch.cat(list(prepared("embeddings", embeddings, "cosine" if normalize else "euclidean")))
    assigned = kmeans(rows, clusters, iterations, seed)

    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    return {
        "nmi": float(normalized_mutual_info_score(labels.numpy(), assigned)),
        "ami": float(adjusted_mutual_info_score(labels.numpy(), assigned)),
        "clusters": clusters,
    }


def _choose(backend: str) -> str:
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    require("sklearn", extra="train", purpose="clustering_metrics")
    if backend == "auto":
        if (reason := faiss_missing()) is None:
            return "faiss"
        warn_once_without_faiss(reason)
        return "scikit-learn"
    if backend == "faiss":
        require_faiss('backend="faiss"')
    return backend


def _faiss_kmeans(rows: Tensor, clusters: int, iterations: int, seed: int) -> np.ndarray:
    """The cluster (n,) of each row (n, D). It runs on the GPU of the rows if faiss supports GPUs."""
    import faiss

    on_gpu = rows.is_cuda and faiss_sees_gpus()
    values = np.ascontiguousarray(rows.cpu().numpy())
    # By default, faiss trains on a sample of 256 rows per cluster and warns below 39. Here all rows take part.
    kmeans = faiss.Kmeans(
        rows.shape[1],
        clusters,
        niter=iterations,
        seed=seed,
        gpu=on_gpu,
        min_points_per_centroid=1,
        max_points_per_centroid=len(values),
    )
    kmeans.train(values)
    return kmeans.index.search(values, 1)[1][:, 0]


def _sklearn_kmeans(rows: Tensor, clusters: int, iterations: int, seed: int) -> np.ndarray:
    """The same as `_faiss_kmeans`, on the CPU."""
    from sklearn.cluster import KMeans

    kmeans = KMeans(clusters, init="random", n_init=1, max_iter=iterations, tol=0, algorithm="lloyd", random_state=seed)
    return kmeans.fit_predict(rows.cpu().numpy())
