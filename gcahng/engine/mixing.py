"""Mixing on a tile: coefficients and embeddings to negatives, and back (see gcahng.reference.mix and docs/math).

With ρ = min(d⁺/d⁻, 1), a negative's share is r = ρ + (1 - ρ) θ · pull (1 where the negative is nearer than the positive),
and N = a + Σ_v κ_v (b_v - a) r_v, where κ_v = (1 - u_v) Π_{w>v} u_w (u_0 = 0) sums to 1: no chain to walk.
A tile holds both directions of a pair of classes: from its anchors to its columns, and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.schedule import Band, NodeSum, Schedule, Tile

SMALL = 1e-6


def mixing_weights(u: Tensor) -> Tensor:
    """u (K, K-1) → κ (K, K): the weight of view v in the mix for anchor view k; rows sum to 1."""
    views = u.shape[0]
    kappa = [u.new_ones(views)]
    for v in range(views - 1):
        kappa = [share * u[:, v] for share in kappa] + [1 - u[:, v]]
    return torch.stack(kappa, dim=1)


class Direction(NamedTuple):
    """One direction of a tile: anchors (A, Ka, O, 1, D) and negatives (A, ·, O, Kb, D), broadcasting; θ (A, Ka, O, Kb, D);
    to_positive (A, Ka, ·, 1): d⁺; index: where an (A, Ka, O) array lies in a (K, C, C) one; classes: the negatives' classes,
    broadcasting to (A, Ka, O); own: whether offset 0 holds a class's negatives of its own."""

    forward: bool
    skip: int
    anchors: Tensor
    negatives: Tensor
    theta: Tensor
    to_positive: Tensor
    index: tuple[Tensor, Tensor, Tensor]
    classes: Tensor
    own: bool


class Mixed(NamedTuple):
    """negatives N (A, Ka, O, D) and what the backward needs."""

    negatives: Tensor
    difference: Tensor
    ratio: Tensor
    share: Tensor
    to_negative: Tensor
    easy: Tensor


class Mixer:
    """The mixing of one pass. z: embeddings (n, D) as a band; pull: 0-dim; kappa (K, K)."""

    def __init__(self, schedule: Schedule, z: Tensor, pull: Tensor, kappa: Tensor) -> None:
        self.schedule, self.pull, self.kappa = schedule, pull, kappa
        views = z.view(schedule.classes, schedule.views, -1)
        self.step = views - views.roll(-1, dims=1) + SMALL
        self.to_positive = self.step.norm(dim=-1, keepdim=True)
        self.z = Band(schedule, z)
        self.d_plus = Band(schedule, self.to_positive.view(-1, 1))

    def directions(self, tile: Tile, theta: Tensor) -> Iterator[Direction]:
        """θ (T, D), seen from either end."""
        grid = theta.view(*self.schedule.shape(tile), theta.shape[-1])
        device = theta.device
        view = torch.arange(self.schedule.views, device=device)[None, :, None]
        first = torch.arange(tile.first_class, tile.first_class + tile.classes, device=device)[:, None, None]
        columns = self.schedule.column_classes(tile, device)[:, None]
        rows, across = self.z.rows(tile), self.z.columns(tile)
        yield Direction(
            True,
            0,
            rows[:, :, None, None],
            across[:, None],
            grid,
            self.d_plus.rows(tile)[:, :, None],
            (view, first, columns),
            columns,
            tile.first_offset == 0,
        )
        if tile.mirrored < tile.offsets:
            skip = tile.mirrored
            across, columns = across[:, skip:], columns[..., skip:]
            yield Direction(
                False,
                skip,
                across.transpose(1, 2)[:, :, :, None],
                rows[:, None, None],
                grid[:, :, skip:].transpose(1, 3),
                self.d_plus.columns(tile)[:, skip:].transpose(1, 2),
                (view, columns, first),
                first,
                False,
            )

    def mix(self, d: Direction) -> Mixed:
        difference = d.negatives - d.anchors
        to_negative = (difference - SMALL).norm(dim=-1)
        easy = d.to_positive < to_negative
        ratio = torch.where(easy, d.to_positive / to_negative, 1.0)
        share = torch.addcmul(ratio[..., None], (1 - ratio)[..., None] * self.pull, d.theta)
        weights = self.kappa[:, None, :, None]
        negatives = (share * difference * weights).sum(dim=3) + d.anchors[:, :, :, 0]
        return Mixed(negatives, difference, ratio, share, to_negative, easy)

    def backward_to_theta(self, m: Mixed, dn: Tensor) -> Tensor:
        """dN (A, Ka, O, D) → dθ (A, Ka, O, Kb, D)."""
        scale = (1 - m.ratio) * self.kappa[:, None, :] * self.pull
        return dn[:, :, :, None] * m.difference * scale[..., None]

    def backward_to_embeddings(
        self, tile: Tile, d: Direction, m: Mixed, dn: Tensor, into: NodeSum, into_positive: NodeSum
    ) -> None:
        """dN (A, Ka, O, D) → gradients of z, and of d⁺ (n, 1), summed over nodes."""
        weighted = dn[:, :, :, None] * self.kappa[:, None, :, None]
        d_ratio = (weighted * m.difference * (1 - self.pull * d.theta)).sum(dim=-1) * m.easy
        d_difference = weighted * m.share
        along = -d_ratio * m.ratio / m.to_negative.square()
        d_difference.addcmul_(along[..., None], m.difference - SMALL)
        d_anchors = dn - d_difference.sum(dim=3)
        d_positive = (d_ratio / m.to_negative).sum(dim=3)[..., None]
        if d.forward:
            into.add_rows(tile, d_anchors.sum(dim=2))
            into.add_columns(tile, d_difference.sum(dim=1))
            into_positive.add_rows(tile, d_positive.sum(dim=2))
        else:
            into.add_columns(tile, d_anchors.transpose(1, 2), skip=d.skip)
            into.add_rows(tile, d_difference.sum(dim=(1, 2)))
            into_positive.add_columns(tile, d_positive.transpose(1, 2), skip=d.skip)

    def positive_backward(self, d_positive: Tensor) -> Tensor:
        """Gradient of d⁺ (n, 1) → of z (n, D)."""
        unit = self.step / self.to_positive
        d = d_positive.view_as(self.to_positive) * unit
        return (d - d.roll(1, dims=1)).reshape(d_positive.shape[0], -1)

    def merge(self, tile: Tile, d: Direction, dtheta: Tensor, into: Tensor) -> None:
        """Adds a direction's dθ (A, Ka, O, Kb, D) to the tile's (T, D)."""
        grid = into.view(*self.schedule.shape(tile), into.shape[-1])
        if d.forward:
            grid += dtheta
        else:
            grid[:, :, d.skip :] += dtheta.transpose(1, 3)
