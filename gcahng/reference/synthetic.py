"""J_syn: what a batch's synthetic negatives are compared with, and in which geometry (docs/loss.md, "Pairings")."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.reference.npair import synthetic_npair

SMALLEST_NORM = 1e-12


class OnNegatives(Protocol):
    """A loss of synthetic negatives.

    Attributes:
        additive: whether it is the mean of what each negative gives by itself, so that it may be formed in parts.
        of_pairs: whether it compares each anchor with its positives and its negatives.
    """

    additive: bool
    of_pairs: bool

    def __call__(self, negatives: Tensor, classes: Tensor, node: Tensor, z: Tensor, labels: Tensor) -> Tensor:
        """Forms the loss, 0-dim.

        Args:
            negatives: N (m, D).
            classes: their labels (m,).
            node: the row of z that is each one's anchor (m,).
            z: embeddings (n, D) in canonical order.
            labels: their labels (n,).
        """
        ...

    def trained(self) -> list[Tensor]:
        """The parameters of the loss that want a gradient."""
        ...


class Synthetic(NamedTuple):
    """How J_syn is formed of the negatives.

    Attributes:
        pairing: npair (the paper's), cosine or base.
        anchor_gradient: whether J_syn moves anchors and positives; without it, it moves the real negatives alone.
        temperature: of the cosines.
        base: the loss of pairing "base".
    """

    pairing: str = "npair"
    anchor_gradient: bool = True
    temperature: float = 0.1
    base: OnNegatives | None = None


PAPER = Synthetic()


def synthetic_loss(how: Synthetic, views: Tensor, negatives: Tensor, classes: Tensor) -> Tensor:
    """Forms J_syn, not yet weighted.

    Args:
        how: which loss.
        views: embeddings (K, C, D), view k of class a; detached where anchors are held fixed.
        negatives: N (K, C, C, D) of anchor view k of class a against class c. The entries a = c are no negatives.
        classes: labels (C,).

    Returns:
        The loss, 0-dim.
    """
    if how.pairing == "npair":
        return synthetic_npair(views, negatives)
    if how.pairing == "cosine":
        return synthetic_cosine(views, negatives, how.temperature)
    assert how.base is not None
    num_views, count, dim = views.shape
    place = torch.arange(count, device=views.device)
    others = (place[:, None] != place).expand(num_views, count, count)
    view, anchor, negative = others.nonzero(as_tuple=True)
    z = views.transpose(0, 1).reshape(-1, dim)
    labels = classes.repeat_interleave(num_views)
    return how.base(negatives[others], classes[negative], anchor * num_views + view, z, labels)


def synthetic_cosine(views: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """J_syn in cosines: cross entropy of cos(a, ·) / temperature, where a's own class has the positive.

    Args:
        views: embeddings (K, C, D).
        negatives: N (K, C, C, D).
        temperature: of the cosines.

    Returns:
        The loss, 0-dim: the mean over all anchors. It has no L2 term, since it does not depend on lengths.
    """
    count = views.shape[1]
    target = torch.arange(count, device=views.device)
    own = (target[:, None] == target)[..., None]
    unit, opponents = F.normalize(views, dim=-1, eps=SMALLEST_NORM), F.normalize(negatives, dim=-1, eps=SMALLEST_NORM)
    opponents = torch.where(own, unit.roll(-1, dims=0)[:, :, None], opponents)
    logits = torch.einsum("kad,kacd->kac", unit, opponents) / temperature
    return F.cross_entropy(logits.flatten(0, 1), target.repeat(views.shape[0]))
