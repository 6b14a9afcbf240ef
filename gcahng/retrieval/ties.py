"""Ties: four ways to order gallery rows that are at the same distance.

"index" takes them in gallery order. "optimistic" puts the right ones first and "pessimistic" puts them last; no order
gives better or worse metrics. "expected" is the mean over all orders, each equally likely, in closed form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TIES = ("index", "expected", "optimistic", "pessimistic")


class TieGroups(NamedTuple):
    """For every rank of a ranking (q, k), the group of rows at the same distance as the row there.

    Attributes:
        start: (q, k) int64 number of rows that are nearer than the group.
        size: (q, k) int64 number of rows in the group, including those beyond rank k.
        right_before: (q, k) int64 number of right rows that are nearer than the group.
        right: (q, k) int64 number of right rows in the group.
    """

    start: Tensor
    size: Tensor
    right_before: Tensor
    right: Tensor


class FirstMatch(NamedTuple):
    """Where the first right row of a query stands, which decides Recall@K.

    Attributes:
        closer: (q,) int64 number of rows that are nearer, all of them wrong.
        tied: (q,) int64 number of rows at its distance, itself included.
        tied_right: (q,) int64 number of right rows among these.
        tied_before: (q,) int64 number of rows among these that come before the first right one in gallery order.
    """

    closer: Tensor
    tied: Tensor
    tied_right: Tensor
    tied_before: Tensor


def tie_groups(distances: Tensor, right: Tensor, beyond: Tensor, beyond_right: Tensor) -> TieGroups:
    """Find the groups of equal distances in a ranking.

    Args:
        distances: (q, k), ascending.
        right: (q, k) bool, whether the row at that rank is right.
        beyond: (q,) number of rows after rank k at the distance of rank k.
        beyond_right: (q,) number of right rows among these.
    """
    q, k = distances.shape
    rank = torch.arange(k, device=distances.device).expand(q, -1)
    edge = torch.ones(q, 1, dtype=torch.bool, device=distances.device)
    changes = distances[:, 1:] != distances[:, :-1]
    start = torch.where(torch.cat([edge, changes], dim=1), rank, 0).cummax(dim=1).values
    # The last rank of the group, found from the right.
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
    """For every rank i, right(i) and precision@i · right(i), or their expectations.

    Take a group of g rows, m of them right, in random order. The row at its t-th place is right with probability m / g.
    If it is, (t - 1) (m - 1) / (g - 1) of the t - 1 rows before it in the group are right on average.

    Args:
        right: (q, k) bool, whether the row at each rank is right.
        groups: the groups of equal distances.
        ties: one of `TIES`.

    Returns:
        Two (q, k) float64 tensors.
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
    """Find the first right row in each ranking.

    Unless `ties` is "index", a right row after rank k at the distance of rank k counts as well.

    Returns:
        (q,) bool, whether a ranking has a right row, and where that stands. The latter has no meaning for the others.
    """
    met = right if ties == "index" else groups.right > 0
    first = met.to(torch.uint8).argmax(dim=1, keepdim=True)
    group = TieGroups(*(field.gather(1, first).squeeze(1) for field in groups))
    return met.any(dim=1), FirstMatch(group.start, group.size, group.right, first.squeeze(1) - group.start)


def recall(match: FirstMatch, k: int, ties: str) -> Tensor:
    """Recall@k (q,) float64: whether the first right row is among the k nearest, or the probability of that."""
    if ties == "index":
        return (match.closer + match.tied_before < k).double()
    if ties == "optimistic":
        return (match.closer < k).double()
    if ties == "pessimistic":
        return (match.closer + match.tied - match.tied_right < k).double()
    # If s of the g tied rows are among the k nearest, all s are wrong with probability C(g - m, s) / C(g, s).
    drawn = (k - match.closer).clamp_min(0).minimum(match.tied)
    missed = torch.ones(len(drawn), dtype=torch.float64, device=drawn.device)
    for i in range(int(match.tied_right.max()) if len(drawn) else 0):
        left = match.tied - i
        factor = (left - drawn).clamp_min(0).double() / left.clamp_min(1)
        missed = torch.where(i < match.tied_right, missed * factor, missed)
    return 1 - missed
