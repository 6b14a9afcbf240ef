"""A map of the embedding in two dimensions."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gcahng.errors import UserError
from gcahng.extras import require

METHODS = ("auto", "umap", "pca")
UMAP_NEIGHBORS = 15


@dataclass(frozen=True)
class EmbeddingMap:
    """Some images as points in the plane.

    Attributes:
        rows: (p,) the rows of the images.
        places: (p, 2) where they lie, both axes in one unit.
        method: "umap" or "pca".
        explained: the share of the variance that the two components of PCA hold; None for UMAP.
    """

    rows: Tensor
    places: Tensor
    method: str
    explained: float | None


def embedding_map(
    embeddings: Tensor, labels: Tensor, *, method: str = "auto", images: int = 1200, classes: int = 100, seed: int = 0
) -> EmbeddingMap:
    """Place the images of some random classes in the plane by their normalized embeddings.

    Args:
        embeddings: (n, D).
        labels: (n,).
        method: "umap", "pca", or "auto": UMAP where it is installed.
        images: the most images that are shown. All images of a class are shown, but for a first class that is larger.
        classes: the most classes that are shown.
        seed: of the choice and of UMAP.

    Returns:
        Where each image lies.

    Raises:
        UserError: the method is unknown, or UMAP is asked for and missing.
    """
    if method not in METHODS:
        raise UserError(f"map is {method!r}; it must be one of {', '.join(METHODS)}")
    if method == "umap":
        require("umap", extra="umap", purpose="the map is drawn by UMAP")
    rows = _choose(labels.cpu(), images, classes, seed)
    points = normalize(embeddings.detach().cpu()[rows], dim=1)
    explained = None
    # UMAP's neighborhoods need more points than this; PCA does not.
    if method == "umap" or (method == "auto" and find_spec("umap") and len(rows) > 2 * UMAP_NEIGHBORS):
        method, places = "umap", _umap(points, seed)
    else:
        method, (places, explained) = "pca", _pca(points)
    return EmbeddingMap(rows, places, method, explained)


def _choose(labels: Tensor, images: int, classes: int, seed: int) -> Tensor:
    """The rows of random classes, ascending."""
    present = labels.unique()
    order = present[torch.randperm(len(present), generator=torch.Generator().manual_seed(seed))]
    chosen: list[Tensor] = []
    for label in order[:classes].tolist():
        members = (labels == label).nonzero().squeeze(1)
        if chosen and sum(map(len, chosen)) + len(members) > images:
            break
        chosen.append(members[:images])
    return torch.cat(chosen).sort().values


def _pca(points: Tensor) -> tuple[Tensor, float]:
    """(p, 2) scores on the two first principal components, and their share of the variance."""
    centered = (points - points.mean(dim=0)).double()
    u, s, _ = torch.linalg.svd(centered, full_matrices=False)
    scores = u[:, :2] * s[:2]
    if scores.shape[1] < 2:
        scores = torch.nn.functional.pad(scores, (0, 2 - scores.shape[1]))
    # An axis has no sign of its own: the farthest point lies on its positive side.
    far = scores.gather(0, scores.abs().argmax(dim=0, keepdim=True))
    total = s.square().sum()
    return scores * torch.where(far < 0, -1.0, 1.0), (s[:2].square().sum() / total).item() if total > 0 else 1.0


def _umap(points: Tensor, seed: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a seed rules parallel code out; others are numba's own
        from umap import UMAP

        # The distance spreads the images of a tight class, which would lie on one another.
        umap = UMAP(n_neighbors=UMAP_NEIGHBORS, min_dist=0.6, metric="cosine", random_state=seed)
        places = umap.fit_transform(points.numpy())
    return torch.from_numpy(places).double()
