"""Mix: coefficients and embeddings to negatives, and back (docs/math/mix.md; gcahng.reference.mix says what it means).

With ρ = min(d⁺/d⁻, 1), a negative's share is r = ρ + (1 − ρ) θ · pull (1 where the negative is nearer than the
positive), and N = a + Σ_v κ_v (b_v − a) r_v, where κ_v = (1 − u_v) Π_{w>v} u_w (u_0 = 0) sums to 1: no chain to walk.

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
from gcahng.engine.schema import TileNumbers, Written, declare
from gcahng.engine.stages.common import Stage

SMALL = 1e-6


class Mixing(NamedTuple):
    """What is mixed, prepared once a pass.

    Attributes:
        z: embeddings (n, D), as a band.
        d_plus: d⁺ (n, 1), each node's distance to its positive, as a band.
        step: (C, K, D), what each node lies from its positive, 1e-6 added to each channel.
        kappa: κ (K, K).
        pull: exp(−α / J̄_m), 0-dim.
    """

    z: Band
    d_plus: Band
    step: Tensor
    kappa: Tensor
    pull: Tensor

    def anchors(self, index: MixIndex) -> Tensor:
        """The anchors of mixes (mixes, D)."""
        nodes = self.z.nodes
        return nodes.view(-1, nodes.shape[-1])[index.node]

    def positive_backward(self, d_positive: Tensor) -> Tensor:
        """Gradient of d⁺ (n, 1) → of z (n, D)."""
        to_positive = self.d_plus.nodes
        d = d_positive.view_as(to_positive) * (self.step / to_positive)
        return (d - d.roll(1, dims=1)).reshape(d_positive.shape[0], -1)


def mixing_of(schedule: Schedule, z: Tensor, u: Tensor, pull: Tensor) -> Mixing:
    """Prepares the mixing of embeddings z (n, D) by draws u (K, K − 1) and pull (0-dim)."""
    views = z.view(schedule.classes, schedule.views, -1)
    step = views - views.roll(-1, dims=1) + SMALL
    d_plus = step.norm(dim=-1, keepdim=True)
    return Mixing(Band(schedule, z), Band(schedule, d_plus.view(-1, 1)), step, mixing_weights(u), pull.to(z.dtype))


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


# -- as ops


class MixInputs(NamedTuple):
    """z (classes + reach, K, D), d_plus (classes + reach, K, 1), kappa (K, K), pull (0-dim)."""

    tile: TileNumbers
    z: Tensor
    d_plus: Tensor
    kappa: Tensor
    pull: Tensor


class MixOutputs(NamedTuple):
    """theta (T, D) → those that are given: negatives N (mixes, D); logits a·N and squares ‖N‖² (mixes,), together."""

    theta: Tensor
    negatives: Written | None
    logits: Written | None
    squares: Written | None


class MixThetaGradient(NamedTuple):
    """dn (mixes, D) → dtheta (T, D), both directions of an edge together."""

    dn: Tensor
    dtheta: Written


class MixUpstream(NamedTuple):
    """What comes down to the mixes, in one of two forms.

    Attributes:
        theta: (T, D).
        dlogits: (mixes,), the gradient of the logits a·N; then dN = square N + dlogits a, and the mixes of a class with
            itself, which are no negatives, are left out.
        square: weight of ‖N‖², beside dlogits.
        dn: (mixes, D), the gradient of N itself, in the place of dlogits; no mix is left out.
    """

    theta: Tensor
    dlogits: Tensor | None
    square: float
    dn: Tensor | None


class MixNodeGradients(NamedTuple):
    """dz and dd_plus, as z and d_plus, which are added to."""

    dz: Written
    dd_plus: Written


FORWARD = declare("mix_fwd_", "mix.forward", MixInputs, MixOutputs)
BACKWARD_THETA = declare("mix_bwd_theta_", "mix.backward_theta", MixInputs, MixThetaGradient)
BACKWARD_Z = declare("mix_bwd_z_", "mix.backward_z", MixInputs, MixUpstream, MixNodeGradients)


# -- implementations


class Mix(Stage):
    """In plain torch."""

    def negatives(self, m: Mixing, tile: Tile, theta: Tensor) -> Tensor:
        """θ (T, D) → N (mixes, D)."""
        parts = []
        for d in self._directions(m, tile, theta):
            mixed = _mix(m, d, _shares(d))
            parts.append((mixed if d.forward else mixed.transpose(1, 2)).reshape(-1, theta.shape[-1]))
        return torch.cat(parts)

    def logits(self, m: Mixing, tile: Tile, theta: Tensor) -> tuple[Tensor, Tensor]:
        """θ (T, D) → a·N and ‖N‖² (mixes,)."""
        negatives = self.negatives(m, tile, theta)
        anchors = m.anchors(mix_index(self.schedule, tile, theta.device))
        return (negatives * anchors).sum(dim=1), negatives.square().sum(dim=1)

    def backward_theta(self, m: Mixing, tile: Tile, dn: Tensor) -> Tensor:
        """dN (mixes, D) → dθ (T, D), both directions of an edge together."""
        dtheta = None
        for d, part in self._paired(m, tile, dn):
            shares = _shares(d)
            scale = (1 - shares.ratio) * m.kappa[:, None, :] * m.pull
            found = part[:, :, :, None] * shares.difference * scale[..., None]
            if d.forward:
                dtheta = found
            else:
                dtheta[:, :, tile.mirrored :] += found.transpose(1, 3)
        return dtheta.reshape(tile.rows, -1)

    def backward_z(self, m: Mixing, tile: Tile, upstream: MixUpstream, into: NodeSum, into_positive: NodeSum) -> None:
        """Adds the gradients of z, and of d⁺ (n, 1)."""
        direct = upstream.dn is None
        given = upstream.dlogits[:, None] if direct else upstream.dn
        for d, g in self._paired(m, tile, given, upstream.theta):
            shares = _shares(d)
            if direct:
                negatives = _mix(m, d, shares)
                dn = torch.addcmul(upstream.square * negatives, g, d.anchors[:, :, :, 0])
                if d.forward and tile.first_offset == 0:
                    dn[:, :, 0] = 0
                    g = torch.cat((torch.zeros_like(g[:, :, :1]), g[:, :, 1:]), dim=2)
            else:
                dn = g
            weighted = dn[:, :, :, None] * m.kappa[:, None, :, None]
            d_ratio = (weighted * shares.difference * (1 - m.pull * d.theta)).sum(dim=-1) * shares.easy
            d_difference = weighted * _share(m, d, shares)
            along = -d_ratio * shares.ratio / shares.to_negative.square()
            d_difference.addcmul_(along[..., None], shares.difference - SMALL)
            d_anchors = dn - d_difference.sum(dim=3)
            if direct:
                d_anchors = d_anchors + g * negatives
            d_positive = (d_ratio / shares.to_negative).sum(dim=3)[..., None]
            if d.forward:
                into.add_rows(tile, d_anchors.sum(dim=2))
                into.add_columns(tile, d_difference.sum(dim=1))
                into_positive.add_rows(tile, d_positive.sum(dim=2))
            else:
                into.add_columns(tile, d_anchors.transpose(1, 2), skip=tile.mirrored)
                into.add_rows(tile, d_difference.sum(dim=(1, 2)))
                into_positive.add_columns(tile, d_positive.transpose(1, 2), skip=tile.mirrored)

    def _directions(self, m: Mixing, tile: Tile, theta: Tensor | None) -> Iterator[_Direction]:
        """θ (T, D), seen from either end."""
        grid = None if theta is None else theta.view(*self.schedule.shape(tile), theta.shape[-1])
        rows, across = m.z.rows(tile), m.z.columns(tile)
        d_plus = m.d_plus.rows(tile)[:, :, None]
        yield _Direction(True, rows[:, :, None, None], across[:, None], grid, d_plus)
        if tile.mirrored < tile.offsets:
            across = across[:, tile.mirrored :]
            back = None if grid is None else grid[:, :, tile.mirrored :].transpose(1, 3)
            d_plus = m.d_plus.columns(tile)[:, tile.mirrored :].transpose(1, 2)
            yield _Direction(False, across.transpose(1, 2)[:, :, :, None], rows[:, None, None], back, d_plus)

    def _paired(
        self, m: Mixing, tile: Tile, x: Tensor, theta: Tensor | None = None
    ) -> Iterator[tuple[_Direction, Tensor]]:
        """Each direction with its part of x (mixes, W), as (A, Ka, O, W)."""
        anchors, views, offsets, _ = self.schedule.shape(tile)
        count = anchors * views * offsets
        for d in self._directions(m, tile, theta):
            if d.forward:
                yield d, x[:count].view(anchors, views, offsets, -1)
            else:
                yield d, x[count:].view(anchors, offsets - tile.mirrored, views, -1).transpose(1, 2)


def _shares(d: _Direction) -> _Shares:
    difference = d.negatives - d.anchors
    to_negative = (difference - SMALL).norm(dim=-1)
    easy = d.to_positive < to_negative
    return _Shares(difference, torch.where(easy, d.to_positive / to_negative, 1.0), to_negative, easy)


def _share(m: Mixing, d: _Direction, shares: _Shares) -> Tensor:
    return torch.addcmul(shares.ratio[..., None], (1 - shares.ratio)[..., None] * m.pull, d.theta)


def _mix(m: Mixing, d: _Direction, shares: _Shares) -> Tensor:
    weighted = _share(m, d, shares) * shares.difference * m.kappa[:, None, :, None]
    return weighted.sum(dim=3) + d.anchors[:, :, :, 0]


class FusedMix(Mix):
    """As fused ops."""

    def negatives(self, m: Mixing, tile: Tile, theta: Tensor) -> Tensor:
        out = self.context.wide("negatives", self._mixes(tile), theta.shape[1])
        self.ops(FORWARD, self._inputs(m, tile), MixOutputs(theta, out, None, None))
        return out

    def logits(self, m: Mixing, tile: Tile, theta: Tensor) -> tuple[Tensor, Tensor]:
        logits, squares = theta.new_empty(2, self._mixes(tile))
        self.ops(FORWARD, self._inputs(m, tile), MixOutputs(theta, None, logits, squares))
        return logits, squares

    def backward_theta(self, m: Mixing, tile: Tile, dn: Tensor) -> Tensor:
        out = self.context.wide("dtheta", tile.rows, dn.shape[1])
        self.ops(BACKWARD_THETA, self._inputs(m, tile), MixThetaGradient(dn, out))
        return out

    def backward_z(self, m: Mixing, tile: Tile, upstream: MixUpstream, into: NodeSum, into_positive: NodeSum) -> None:
        gradients = MixNodeGradients(into.wrapped, into_positive.wrapped)
        self.ops(BACKWARD_Z, self._inputs(m, tile), upstream, gradients)

    def _inputs(self, m: Mixing, tile: Tile) -> MixInputs:
        return MixInputs(self.context.numbers(tile), m.z.wrapped, m.d_plus.wrapped, m.kappa, m.pull)

    def _mixes(self, tile: Tile) -> int:
        return tile.classes * self.schedule.views * (2 * tile.offsets - tile.mirrored)
