"""What retrieval got right and wrong: queries from best to worst, and the classes that are taken for one another."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gcahng.data.sampler import UNLABELED
from gcahng.errors import UserError
from gcahng.retrieval import nearest
from gcahng.retrieval.labels import Classes

GATHERED = 2**24  # numbers of neighbors at once


@dataclass(frozen=True)
class Ranking:
    """The nearest neighbors of every query.

    Attributes:
        labels: (n,) the classes of the queries.
        gallery_labels: (m,) the classes of what they are searched in.
        neighbors: (n, k) gallery indices, nearest first.
        similarities: (n, k) cosines.
        matches: (n,) R, how many other items of the query's class the gallery has.
        precision: (n,) average precision at R, whose mean is MAP@R; NaN where R = 0.
    """

    labels: Tensor
    gallery_labels: Tensor
    neighbors: Tensor
    similarities: Tensor
    matches: Tensor
    precision: Tensor

    @property
    def right(self) -> Tensor:
        """(n, k) whether a neighbor is of the query's class."""
        return (self.gallery_labels[self.neighbors] == self.labels[:, None]) & (self.labels != UNLABELED)[:, None]

    def best(self, count: int) -> list[int]:
        """The queries of the highest precision, one from each class; of equal ones those with the widest gap behind
        the last right neighbor."""
        return self._first_of_classes(torch.stack([-self.precision, -self._gap()]), count)

    def worst(self, count: int) -> list[int]:
        """The queries of the lowest precision, one from each class; of equal ones those most similar to a wrong
        neighbor."""
        wrong = self.similarities.masked_fill(self.right, -torch.inf).amax(dim=1)
        return self._first_of_classes(torch.stack([self.precision, -wrong]), count)

    def random(self, count: int, seed: int) -> list[int]:
        """Random queries, of as many classes as there are."""
        order = torch.rand(len(self.labels), generator=torch.Generator().manual_seed(seed))
        return self._first_of_classes(order[None], count)

    def _gap(self) -> Tensor:
        """(n,) the similarity of the R-th neighbor less that of the next; 0 where that is not known."""
        if self.similarities.shape[1] == 1:
            return torch.zeros(len(self.labels))
        last = self.matches.clamp(1, self.similarities.shape[1] - 1)[:, None]
        return (self.similarities.gather(1, last - 1) - self.similarities.gather(1, last)).squeeze(1)

    def _first_of_classes(self, keys: Tensor, count: int) -> list[int]:
        """The first `count` queries by ascending `keys`, of which the first counts most: one of each class, then more
        where there are fewer classes."""
        order = torch.arange(len(self.labels))
        for key in reversed(keys):
            order = order[key[order].sort(stable=True).indices]
        seen: set[int] = set()
        first, later = [], []
        for index in order[self.matches[order] > 0].tolist():
            label = int(self.labels[index])
            (later if label in seen else first).append(index)
            seen.add(label)
            if len(first) == count:
                return first
        return (first + later)[:count]


@dataclass(frozen=True)
class ConfusedPair:
    """Two classes whose images find each other.

    Attributes:
        classes: both labels, the one with more errors first.
        errors: how many images of either have a nearest neighbor of the other.
        images: how many queries both classes have.
        example: the most similar such pair: a query and its nearest neighbor (an index of the gallery).
    """

    classes: tuple[int, int]
    errors: int
    images: int
    example: tuple[int, int]


def rank(
    embeddings: Tensor,
    labels: Tensor,
    neighbors: int,
    gallery_embeddings: Tensor | None = None,
    gallery_labels: Tensor | None = None,
) -> Ranking:
    """Find the neighbors of every query, at least `neighbors` and as many as its average precision needs.

    Args:
        embeddings: (n, D) of the queries.
        labels: (n,) of the queries.
        neighbors: how many at least; there are fewer only where the gallery is smaller.
        gallery_embeddings: (m, D); None: each query is searched among the other queries.
        gallery_labels: (m,); None with the gallery.

    Returns:
        The neighbors and what they are worth.

    Raises:
        UserError: no query has another item of its class to find.
    """
    embeddings, labels = embeddings.detach().cpu(), labels.cpu()
    own = gallery_embeddings is None
    gallery = embeddings if gallery_embeddings is None else gallery_embeddings.detach().cpu()
    gallery_labels = labels if gallery_labels is None else gallery_labels.cpu()
    matches = (Classes(gallery_labels).sizes(labels) - int(own)).clamp_min(0)
    if not (matches > 0).any():
        raise UserError("no query has another item of its class to find, all have R = 0; labels must repeat a class")
    k = min(max(neighbors, int(matches.max()) + 1), len(gallery) - int(own))
    nearest_items = nearest(embeddings, k, gallery_embeddings=None if own else gallery)
    queries, items = normalize(embeddings, dim=1), normalize(gallery, dim=1)
    at_once = max(1, GATHERED // (k * items.shape[1]))
    similarities = torch.cat(
        [
            (items[rows] @ query[:, :, None]).squeeze(2)
            for rows, query in zip(nearest_items.split(at_once), queries.split(at_once), strict=True)
        ]
    )
    right = (gallery_labels[nearest_items] == labels[:, None]) & (torch.arange(k) < matches[:, None])
    precision = right.cumsum(dim=1).double() / torch.arange(1, k + 1)
    # 0 / 0, a NaN, for queries without a match.
    return Ranking(
        labels, gallery_labels, nearest_items, similarities, matches, (precision * right).sum(dim=1) / matches
    )


def confused_pairs(ranking: Ranking, count: int) -> list[ConfusedPair]:
    """The pairs of classes with the most images whose nearest neighbor is of the other class, most first.

    Args:
        ranking: of all queries.
        count: how many pairs at most.
    """
    nearest_label = ranking.gallery_labels[ranking.neighbors[:, 0]]
    known = (nearest_label != UNLABELED) & (ranking.matches > 0)
    wrong = (known & (nearest_label != ranking.labels)).nonzero().squeeze(1)
    errors: dict[tuple[int, int], list[int]] = defaultdict(list)
    for query in wrong.tolist():
        pair = (int(ranking.labels[query]), int(nearest_label[query]))
        errors[min(pair), max(pair)].append(query)
    classes = Classes(ranking.labels)
    pairs = []
    for (a, b), queries in sorted(errors.items(), key=lambda item: (-len(item[1]), item[0]))[:count]:
        from_a = sum(int(ranking.labels[query]) == a for query in queries)
        shown = max(queries, key=lambda query: float(ranking.similarities[query, 0]))
        pairs.append(
            ConfusedPair(
                classes=(a, b) if 2 * from_a >= len(queries) else (b, a),
                errors=len(queries),
                images=int(classes.sizes(torch.tensor([a, b])).sum()),
                example=(shown, int(ranking.neighbors[shown, 0])),
            )
        )
    return pairs
