"""Mixing on a tile: coefficients and embeddings to negatives, and back (see gcahng.reference.mix and docs/math).

With ρ = min(d⁺/d⁻, 1), a negative's share is r = ρ + (1 - ρ) θ · pull (1 where the negative is nearer than the
positive), and N = a + Σ_v κ_v (b_v - a) r_v, where κ_v = (1 - u_v) Π_{w>v} u_w (u_0 = 0) sums to 1: no chain to walk.

A tile holds both directions of a pair of classes: forward, its anchors against the columns, and back. A tile's mixes
are numbered forward (A, K, O), then, where offsets are mirrored, back (A, O', K): the anchor is a column, the
negatives are the anchor class's views.
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


class MixIndex(NamedTuple):
    """Of each of a tile's mixes (N,): the anchor's view k and class a, the negatives' class c (places), and the
    anchor's node."""

    view: Tensor
    anchor: Tensor
    negative: Tensor
    node: Tensor

    @property
    def place(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the mixes lie in a (K, C, C) array."""
        return self.view, self.anchor, self.negative


def mix_index(schedule: Schedule, tile: Tile, device: torch.device) -> MixIndex:
    """See MixIndex."""
    first = torch.arange(tile.first_class, tile.first_class + tile.classes, device=device)[:, None, None]
    view = torch.arange(schedule.views, device=device)
    columns = schedule.column_classes(tile, device)
    parts = [torch.broadcast_tensors(view[:, None], first, columns[:, None])]
    if tile.mirrored < tile.offsets:
        parts.append(torch.broadcast_tensors(view, columns[:, tile.mirrored :, None], first))
    k, a, c = (torch.cat([part[axis].reshape(-1) for part in parts]) for axis in range(3))
    return MixIndex(k, a, c, a * schedule.views + k)


class _Direction(NamedTuple):
    """One direction of a tile: anchors (A, Ka, O, 1, D) and negatives (A, ·, O, Kb, D), broadcasting; θ (A, Ka, O,
    Kb, D) or None; to_positive (A, Ka, ·, 1): d⁺."""

    forward: bool
    anchors: Tensor
    negatives: Tensor
    theta: Tensor | None
    to_positive: Tensor


class _Shares(NamedTuple):
    """difference b - a (A, Ka, O, Kb, D); ratio ρ, d⁻ and d⁺ < d⁻ (A, Ka, O, Kb)."""

    difference: Tensor
    ratio: Tensor
    to_negative: Tensor
    easy: Tensor


class TorchMixer:
    """The mixing of one pass, in plain torch. z: embeddings (n, D); pull: 0-dim; kappa (K, K)."""

    def __init__(self, schedule: Schedule, z: Tensor, pull: Tensor, kappa: Tensor) -> None:
        self.schedule, self.pull, self.kappa = schedule, pull, kappa
        views = z.view(schedule.classes, schedule.views, -1)
        self._step = views - views.roll(-1, dims=1) + SMALL
        self._to_positive = self._step.norm(dim=-1, keepdim=True)
        self.z = Band(schedule, z)
        self.d_plus = Band(schedule, self._to_positive.view(-1, 1))

    def negatives(self, tile: Tile, theta: Tensor) -> Tensor:
        """θ (T, D) → N (mixes, D)."""
        parts = []
        for d in self._directions(tile, theta):
            mixed = self._mix(d, self._shares(d))
            parts.append((mixed if d.forward else mixed.transpose(1, 2)).reshape(-1, theta.shape[-1]))
        return torch.cat(parts)

    def logits(self, tile: Tile, theta: Tensor) -> tuple[Tensor, Tensor]:
        """θ (T, D) → a·N and ‖N‖² (mixes,)."""
        negatives = self.negatives(tile, theta)
        anchors = self.anchors(mix_index(self.schedule, tile, theta.device))
        return (negatives * anchors).sum(dim=1), negatives.square().sum(dim=1)

    def anchors(self, index: MixIndex) -> Tensor:
        """The anchors of mixes (mixes, D)."""
        return self.z.nodes.view(self.schedule.nodes, -1)[index.node]

    def backward_theta(self, tile: Tile, dn: Tensor) -> Tensor:
        """dN (mixes, D) → dθ (T, D), both directions of an edge together."""
        dtheta = None
        for d, part in self._paired(tile, dn):
            m = self._shares(d)
            scale = (1 - m.ratio) * self.kappa[:, None, :] * self.pull
            found = part[:, :, :, None] * m.difference * scale[..., None]
            if d.forward:
                dtheta = found
            else:
                dtheta[:, :, tile.mirrored :] += found.transpose(1, 3)
        return dtheta.reshape(tile.rows, -1)

    def backward_z(
        self, tile: Tile, theta: Tensor, dlogits: Tensor, square: float, into: NodeSum, into_positive: NodeSum
    ) -> None:
        """Gradients of the logits (mixes,), and the weight of ‖N‖², to z and to d⁺ (n, 1). A class's mixes with
        itself, no negatives, are left out."""
        for d, g in self._paired(tile, dlogits[:, None], theta):
            m = self._shares(d)
            negatives = self._mix(d, m)
            anchors = d.anchors[:, :, :, 0]
            dn = torch.addcmul(square * negatives, g, anchors)
            if d.forward and tile.first_offset == 0:
                dn[:, :, 0] = 0
                g = torch.cat((torch.zeros_like(g[:, :, :1]), g[:, :, 1:]), dim=2)
            weighted = dn[:, :, :, None] * self.kappa[:, None, :, None]
            d_ratio = (weighted * m.difference * (1 - self.pull * d.theta)).sum(dim=-1) * m.easy
            d_difference = weighted * self._share(d, m)
            along = -d_ratio * m.ratio / m.to_negative.square()
            d_difference.addcmul_(along[..., None], m.difference - SMALL)
            d_anchors = dn - d_difference.sum(dim=3) + g * negatives
            d_positive = (d_ratio / m.to_negative).sum(dim=3)[..., None]
            if d.forward:
                into.add_rows(tile, d_anchors.sum(dim=2))
                into.add_columns(tile, d_difference.sum(dim=1))
                into_positive.add_rows(tile, d_positive.sum(dim=2))
            else:
                into.add_columns(tile, d_anchors.transpose(1, 2), skip=tile.mirrored)
                into.add_rows(tile, d_difference.sum(dim=(1, 2)))
                into_positive.add_columns(tile, d_positive.transpose(1, 2), skip=tile.mirrored)

    def positive_backward(self, d_positive: Tensor) -> Tensor:
        """Gradient of d⁺ (n, 1) → of z (n, D)."""
        d = d_positive.view_as(self._to_positive) * (self._step / self._to_positive)
        return (d - d.roll(1, dims=1)).reshape(d_positive.shape[0], -1)

    # -- parts

    def _directions(self, tile: Tile, theta: Tensor | None) -> Iterator[_Direction]:
        """θ (T, D), seen from either end."""
        grid = None if theta is None else theta.view(*self.schedule.shape(tile), theta.shape[-1])
        rows, across = self.z.rows(tile), self.z.columns(tile)
        d_plus = self.d_plus.rows(tile)[:, :, None]
        yield _Direction(True, rows[:, :, None, None], across[:, None], grid, d_plus)
        if tile.mirrored < tile.offsets:
            across = across[:, tile.mirrored :]
            back = None if grid is None else grid[:, :, tile.mirrored :].transpose(1, 3)
            d_plus = self.d_plus.columns(tile)[:, tile.mirrored :].transpose(1, 2)
            yield _Direction(False, across.transpose(1, 2)[:, :, :, None], rows[:, None, None], back, d_plus)

    def _paired(self, tile: Tile, x: Tensor, theta: Tensor | None = None) -> Iterator[tuple[_Direction, Tensor]]:
        """Each direction with its part of x (mixes, W), as (A, Ka, O, W)."""
        anchors, views, offsets, _ = self.schedule.shape(tile)
        count = anchors * views * offsets
        for d in self._directions(tile, theta):
            if d.forward:
                yield d, x[:count].view(anchors, views, offsets, -1)
            else:
                yield d, x[count:].view(anchors, offsets - tile.mirrored, views, -1).transpose(1, 2)

    def _shares(self, d: _Direction) -> _Shares:
        difference = d.negatives - d.anchors
        to_negative = (difference - SMALL).norm(dim=-1)
        easy = d.to_positive < to_negative
        return _Shares(difference, torch.where(easy, d.to_positive / to_negative, 1.0), to_negative, easy)

    def _share(self, d: _Direction, m: _Shares) -> Tensor:
        return torch.addcmul(m.ratio[..., None], (1 - m.ratio)[..., None] * self.pull, d.theta)

    def _mix(self, d: _Direction, m: _Shares) -> Tensor:
        weighted = self._share(d, m) * m.difference * self.kappa[:, None, :, None]
        return weighted.sum(dim=3) + d.anchors[:, :, :, 0]
