"""NMI and AMI: whether k-means of the embeddings finds the classes."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.retrieval.candidates import faiss_sees_gpus, say_once_without_faiss
from gcahng.retrieval.index_base import prepared
from gcahng.retrieval.metrics import check_labels
from gcahng.retrieval.rows import check_embeddings

BACKENDS = ("auto", "faiss", "scikit-learn")

# Those of faiss; also what pytorch-metric-learning leaves them at.
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
    """Normalised and adjusted mutual information between the classes and the clusters that k-means finds.

    Both divide by the arithmetic mean of the two entropies. NMI grows with the number of clusters even where these are
    random; AMI takes off what is expected of random clusters of the same sizes. k-means starts from random rows, so
    that the numbers vary with `seed`, and between backends.

    Args:
        embeddings: (n, D), any floating dtype.
        labels: (n,) integers.
        clusters: of k-means; None: as many as there are classes.
        normalize: cluster rows scaled to norm 1 instead of the rows as they are.
        seed: of the rows that k-means starts from.
        iterations: of k-means, at most.
        backend: of k-means, "faiss", "scikit-learn", or "auto": faiss where it is installed.

    Returns:
        "nmi" and "ami", and the number of "clusters".

    Raises:
        UserError: an argument of a wrong shape, type or range; non-finite values; a zero row with `normalize=True`;
            scikit-learn, which computes the scores, or the backend named is not installed.
    """
    check_embeddings("embeddings", embeddings)
    labels = check_labels("labels", labels, embeddings)
    if clusters is None:
        clusters = len(labels.unique())
    for name, value, least, most in (
        ("clusters", clusters, 1, len(labels)),
        ("iterations", iterations, 1, 1_000_000),
        ("seed", seed, 0, 2**31 - 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UserError(f"{name} must be an integer in {least}..{most}, got {value!r}")
    kmeans = _faiss_kmeans if _choose(backend) == "faiss" else _sklearn_kmeans
    rows = torch.cat(list(prepared("embeddings", embeddings, "cosine" if normalize else "euclidean")))
    found = kmeans(rows, clusters, iterations, seed)

    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    return {
        "nmi": float(normalized_mutual_info_score(labels.numpy(), found)),
        "ami": float(adjusted_mutual_info_score(labels.numpy(), found)),
        "clusters": clusters,
    }


def _choose(backend: str) -> str:
    if backend not in BACKENDS:
        raise UserError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    require("sklearn", extra="train", purpose="clustering_metrics")
    if backend == "auto":
        if importlib.util.find_spec("faiss") is not None:
            return "faiss"
        say_once_without_faiss()
        return "scikit-learn"
    if backend == "faiss":
        require("faiss", extra="faiss-cpu", purpose='backend="faiss"')
    return backend


def _faiss_kmeans(rows: Tensor, clusters: int, iterations: int, seed: int) -> np.ndarray:
    """The cluster (n,) of each row (n, D); on the GPU of the rows where faiss has it (this not run, no GPU at hand)."""
    import faiss

    on_gpu = rows.is_cuda and faiss_sees_gpus()
    values = np.ascontiguousarray(rows.cpu().numpy())
    # All rows take part, not a sample of 256 a cluster; with fewer than 39 a cluster faiss would warn.
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
    """As `_faiss_kmeans`, on the CPU."""
    from sklearn.cluster import KMeans

    kmeans = KMeans(clusters, init="random", n_init=1, max_iter=iterations, tol=0, algorithm="lloyd", random_state=seed)
    return kmeans.fit_predict(rows.cpu().numpy())
