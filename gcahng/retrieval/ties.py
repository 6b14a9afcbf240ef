"""What equal distances do to a ranking: four ways to order the rows of one distance.

"index" takes them as they come in the gallery. "optimistic" puts the right ones first and "pessimistic" last: no order
does better or worse. "expected" is the mean over all their orders, each as likely as the others, in closed form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TIES = ("index", "expected", "optimistic", "pessimistic")


class TieGroups(NamedTuple):
    """For every rank of a ranking (q, k), of the rows at the distance of the one there.

    Attributes:
        start: (q, k) int64 rows nearer than they.
        size: (q, k) int64 how many they are, those beyond rank k included.
        right_before: (q, k) int64 right rows among the nearer ones.
        right: (q, k) int64 right rows among them.
    """

    start: Tensor
    size: Tensor
    right_before: Tensor
    right: Tensor


class FirstMatch(NamedTuple):
    """Where the first right row of a query stands; what Recall@K is made of.

    Attributes:
        closer: (q,) int64 rows nearer than it, all wrong.
        tied: (q,) int64 rows at its distance, itself included.
        tied_right: (q,) int64 right rows among them.
        tied_before: (q,) int64 rows among them before the first right one by index.
    """

    closer: Tensor
    tied: Tensor
    tied_right: Tensor
    tied_before: Tensor


def tie_groups(distances: Tensor, right: Tensor, beyond: Tensor, beyond_right: Tensor) -> TieGroups:
    """The groups of equal distances in a ranking.

    Args:
        distances: (q, k) ascending.
        right: (q, k) whether the row at that rank is right.
        beyond: (q,) rows past rank k at the distance of rank k.
        beyond_right: (q,) the right ones of these.
    """
    q, k = distances.shape
    rank = torch.arange(k, device=distances.device).expand(q, -1)
    edge = torch.ones(q, 1, dtype=torch.bool, device=distances.device)
    changes = distances[:, 1:] != distances[:, :-1]
    start = torch.where(torch.cat([edge, changes], dim=1), rank, 0).cummax(dim=1).values
    # The last rank of the group, sought from the right.
    end = torch.where(torch.cat([changes, edge], dim=1), rank, k).flip(1).cummin(dim=1).values.flip(1)
    count = torch.nn.functional.pad(right.long().cumsum(dim=1), (1, 0))
    right_before = count.gather(1, start)
    last = end == k - 1
    return TieGroups(
        start,
        end + 1 - start + last * beyond.unsqueeze(1),
        right_before,
        count.gather(1, end + 1) - right_before + last * beyond_right.unsqueeze(1),
    )


def gains(right: Tensor, groups: TieGroups, ties: str) -> tuple[Tensor, Tensor]:
    """For every rank i, right(i) and precision@i * right(i) (q, k) float64, or their expectations.

    In a group of g rows, m of them right, behind c right ones, each order as likely: the row at its t-th place is right
    with probability m / g, and then (t - 1) (m - 1) / (g - 1) of the t - 1 before it are right in the mean.
    """
    q, k = right.shape
    rank = torch.arange(1, k + 1, device=right.device)
    if ties == "expected":
        g, m = groups.size.double(), groups.right.double()
        t = rank - groups.start
        before = groups.right_before + (t - 1) * (m - 1) / (g - 1).clamp_min(1)
        return m / g, m / g * (before + 1) / rank
    place = rank - 1 - groups.start
    if ties == "optimistic":
        right = place < groups.right
    elif ties == "pessimistic":
        right = place >= groups.size - groups.right
    return right.double(), right.cumsum(dim=1).double() / rank * right


def first_match(right: Tensor, groups: TieGroups, ties: str) -> tuple[Tensor, FirstMatch]:
    """Which queries (q,) bool meet a right row in their ranking, and where; nonsense for the others.

    But for "index", a right row past rank k at the distance of rank k counts as met.
    """
    met = right if ties == "index" else groups.right > 0
    first = met.to(torch.uint8).argmax(dim=1, keepdim=True)
    at = TieGroups(*(part.gather(1, first).squeeze(1) for part in groups))
    return met.any(dim=1), FirstMatch(at.start, at.size, at.right, first.squeeze(1) - at.start)


def recall(match: FirstMatch, k: int, ties: str) -> Tensor:
    """Recall@k (q,) float64: whether the first right row is among the k nearest, or how likely that is."""
    if ties == "index":
        return (match.closer + match.tied_before < k).double()
    if ties == "optimistic":
        return (match.closer < k).double()
    if ties == "pessimistic":
        return (match.closer + match.tied - match.tied_right < k).double()
    # s of the g tied rows are among the k nearest; all s are wrong with probability C(g - m, s) / C(g, s).
    drawn = (k - match.closer).clamp_min(0).minimum(match.tied)
    missed = torch.ones(len(drawn), dtype=torch.float64, device=drawn.device)
    for i in range(int(match.tied_right.max()) if len(drawn) else 0):
        left = match.tied - i
        factor = (left - drawn).clamp_min(0).double() / left.clamp_min(1)
        missed = torch.where(i < match.tied_right, missed * factor, missed)
    return 1 - missed
