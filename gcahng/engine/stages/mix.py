"""Mix: forms negatives from coefficients and embeddings, and differentiates them (docs/math/mix.md).

gcahng.reference.mix says what it means. With ρ = min(d⁺/d⁻, 1), a negative's share is r = ρ + (1 − ρ) θ · pull (1 where
the negative is nearer than the positive). Then N = a + Σ_v κ_v (b_v − a) r_v, where the weights
κ_v = (1 − u_v) Π_{w>v} u_w (with u_0 = 0) sum to 1. So there is no chain of mixes to walk.

A tile holds both directions of a pair of classes: forward, its anchor classes against the column classes, and back. Its
mixes are numbered forward first (A, K, O). If offsets are mirrored, those back follow (A, O', K): their anchor is a
column, and their negatives are the views of the anchor class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.schedule import Band, NodeSum, Tile, bands_of
from gcahng.engine.schema import TileNumbers, Written, declare
from gcahng.engine.stages.common import Stage, StageContext
from gcahng.engine.stages.mix_index import MixIndex, mix_index, tile_mixes

SMALL = 1e-6


class Mixing(NamedTuple):
    """What is mixed, prepared once a pass.

    Attributes:
        z: embeddings (n, D) as a band.
        d_plus: each node's distance d⁺ to its positive (n, 1) as a band.
        step: each node minus its positive (C, K, D), with 1e-6 added to each channel.
        kappa: mixing weights κ (K, K).
        pull: exp(−α / J̄_m), 0-dim.
    """

    z: Band
    d_plus: Band
    step: Tensor
    kappa: Tensor
    pull: Tensor

    def anchors(self, index: MixIndex) -> Tensor:
        """The anchors (mixes, D) of these mixes."""
        nodes = self.z.nodes
        return nodes.view(-1, nodes.shape[-1])[index.node]

    def positive_backward(self, d_positive: Tensor) -> Tensor:
        """The gradient of z (n, D) through d⁺, whose gradient is (n, 1)."""
        to_positive = self.d_plus.nodes
        d = d_positive.view_as(to_positive) * (self.step / to_positive)
        return (d - d.roll(1, dims=1)).reshape(d_positive.shape[0], -1)


def mixing_of(context: StageContext, z: Tensor, u: Tensor, pull: Tensor) -> Mixing:
    """Prepares the mixing of a batch.

    Args:
        context: what all stages of the pass work with.
        z: embeddings (n, D).
        u: mixing draws (K, K − 1).
        pull: exp(−α / J̄_m), 0-dim.
    """
    room, d_plus = context.wrapped("mixed z", z.shape[1]), context.wrapped("d plus", 1)
    views = room.nodes.copy_(z.reshape(room.nodes.shape))
    step = views - views.roll(-1, dims=1) + SMALL
    torch.linalg.vector_norm(step, dim=-1, keepdim=True, out=d_plus.nodes)
    return Mixing(*bands_of(context.schedule, room, d_plus), step, mixing_weights(u), pull.to(z.dtype))


def mixing_weights(u: Tensor) -> Tensor:
    """The weights κ (K, K) of view v in the mix for anchor view k, from draws u (K, K − 1). Rows sum to 1."""
    views = u.shape[0]
    kappa = [u.new_ones(views)]
    for draw, rest in zip(u.unbind(1), (1 - u).unbind(1), strict=True):
        kappa = [*torch._foreach_mul(kappa, [draw] * len(kappa)), rest]
    return torch.stack(kappa, dim=1)


class _Direction(NamedTuple):
    """One direction of a tile, in tensors that broadcast against each other.

    Attributes:
        forward: whether the tile's anchor classes are the anchors.
        anchors: (A, Ka, O, 1, D).
        negatives: (A, 1, O, Kb, D), or (A, 1, 1, Kb, D).
        theta: θ (A, Ka, O, Kb, D), or None.
        to_positive: d⁺ (A, Ka, O or 1, 1).
    """

    forward: bool
    anchors: Tensor
    negatives: Tensor
    theta: Tensor | None
    to_positive: Tensor


class _Shares(NamedTuple):
    """What the shares of one direction follow from, beside θ.

    Attributes:
        difference: b − a (A, Ka, O, Kb, D).
        ratio: ρ (A, Ka, O, Kb).
        to_negative: d⁻ (A, Ka, O, Kb).
        easy: d⁺ < d⁻ (A, Ka, O, Kb), bool.
    """

    difference: Tensor
    ratio: Tensor
    to_negative: Tensor
    easy: Tensor


# -- as ops


class MixInputs(NamedTuple):
    """What all ops take (see Mixing).

    Attributes:
        tile: where the edges lie.
        z: (classes + reach, K, D).
        d_plus: (classes + reach, K, 1).
        kappa: (K, K).
        pull: 0-dim.
    """

    tile: TileNumbers
    z: Tensor
    d_plus: Tensor
    kappa: Tensor
    pull: Tensor


class MixOutputs(NamedTuple):
    """What the forward takes and writes; None where a result is not wanted.

    Attributes:
        theta: θ (T, D).
        negatives: N (mixes, D).
        logits: a·N (mixes,).
        squares: ‖N‖² (mixes,); wanted if and only if the logits are.
    """

    theta: Tensor
    negatives: Written | None
    logits: Written | None
    squares: Written | None


class MixThetaGradient(NamedTuple):
    """What the backward to θ takes and writes.

    Attributes:
        dn: gradient of N (mixes, D).
        dtheta: gradient of θ (T, D), both directions of an edge added up.
    """

    dn: Tensor
    dtheta: Written


class MixUpstream(NamedTuple):
    """What comes down to the mixes, in one of two forms.

    Attributes:
        theta: θ (T, D).
        dlogits: gradient of the logits a·N (mixes,), or None. With it dN = square N + dlogits a, and the mixes of a
            class with itself, which are no negatives, are left out.
        square: the weight of ‖N‖² beside dlogits.
        dn: gradient of N itself (mixes, D) in the place of dlogits, or None. With it no mix is left out.
    """

    theta: Tensor
    dlogits: Tensor | None
    square: float
    dn: Tensor | None


class MixNodeGradients(NamedTuple):
    """What the backward to nodes adds to.

    Attributes:
        dz: gradient of z (classes + reach, K, D).
        dd_plus: gradient of d⁺ (classes + reach, K, 1).
    """

    dz: Written
    dd_plus: Written


declare("mix_fwd_", "mix.forward", MixInputs, MixOutputs)
declare("mix_bwd_theta_", "mix.backward_theta", MixInputs, MixThetaGradient)
declare("mix_bwd_z_", "mix.backward_z", MixInputs, MixUpstream, MixNodeGradients)


# -- implementations


class Mix(Stage):
    """The mix in plain torch."""

    def negatives(self, m: Mixing, tile: Tile, theta: Tensor) -> Tensor:
        """Forms a tile's negatives N (mixes, D) from θ (T, D)."""
        parts = []
        for d in self._directions(m, tile, theta):
            mixed = _mix(m, d, _shares(d))
            parts.append((mixed if d.forward else mixed.transpose(1, 2)).reshape(-1, theta.shape[-1]))
        return torch.cat(parts)

    def logits(self, m: Mixing, tile: Tile, theta: Tensor, logits: Tensor, squares: Tensor) -> None:
        """Forms what J_syn needs of a tile's negatives.

        Args:
            m: what is mixed.
            tile: where the edges lie.
            theta: θ (T, D).
            logits: a·N (mixes,), which are written.
            squares: ‖N‖² (mixes,), which are written.
        """
        negatives = self.negatives(m, tile, theta)
        anchors = m.anchors(mix_index(self.schedule, tile, theta.device))
        torch.sum(negatives * anchors, dim=1, out=logits)
        torch.sum(negatives.square(), dim=1, out=squares)

    def backward_theta(self, m: Mixing, tile: Tile, dn: Tensor) -> Tensor:
        """The gradient of θ (T, D), both directions of an edge added up, from that of N (mixes, D)."""
        dtheta = None
        for d, part in self._paired(m, tile, dn):
            shares = _shares(d)
            scale = (1 - shares.ratio) * m.kappa[:, None, :] * m.pull
            of_direction = part[:, :, :, None] * shares.difference * scale[..., None]
            if d.forward:
                dtheta = of_direction
            else:
                dtheta[:, :, tile.mirrored :] += of_direction.transpose(1, 3)
        return self.context.rounded(dtheta.reshape(tile.rows, -1))

    def backward_z(
        self,
        m: Mixing,
        tile: Tile,
        upstream: MixUpstream,
        into: NodeSum,
        into_positive: NodeSum,
        *,
        anchors: bool = True,
    ) -> None:
        """Adds the gradients of nodes.

        Args:
            m: what is mixed.
            tile: where the edges lie.
            upstream: what comes down.
            into: gradient of z (n, D), which is added to.
            into_positive: gradient of d⁺ (n, 1), which is added to.
            anchors: whether anchors and d⁺ have a gradient; without it only the real negatives have one.
        """
        through_logits = upstream.dn is None
        values = upstream.dlogits[:, None] if through_logits else upstream.dn
        for d, g in self._paired(m, tile, values, upstream.theta):
            shares = _shares(d)
            if through_logits:
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
            if anchors:
                d_anchors = dn - d_difference.sum(dim=3)
                if through_logits:
                    d_anchors = d_anchors + g * negatives
                self._add_at_anchors(d, tile, d_anchors, into)
                self._add_at_anchors(d, tile, (d_ratio / shares.to_negative).sum(dim=3)[..., None], into_positive)
            if d.forward:
                into.add_columns(tile, d_difference.sum(dim=1))
            else:
                into.add_rows(tile, d_difference.sum(dim=(1, 2)))

    def add_at_anchors(self, m: Mixing, tile: Tile, values: Tensor, into: NodeSum) -> None:
        """Adds a vector of each mix at its anchor.

        Args:
            m: what is mixed.
            tile: where the edges lie.
            values: (mixes, D).
            into: (n, D), which is added to.
        """
        for d, part in self._paired(m, tile, values):
            self._add_at_anchors(d, tile, part, into)

    def _add_at_anchors(self, d: _Direction, tile: Tile, values: Tensor, into: NodeSum) -> None:
        """Adds values (A, Ka, O, W) of the mixes of one direction at their anchors."""
        if d.forward:
            into.add_rows(tile, values.sum(dim=2))
        else:
            into.add_columns(tile, values.transpose(1, 2), skip=tile.mirrored)

    def _directions(self, m: Mixing, tile: Tile, theta: Tensor | None) -> Iterator[_Direction]:
        """The directions of a tile, with θ (T, D) seen from either end."""
        grid = None if theta is None else self.context.grid(tile, self.context.full(theta))
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
    """Distances and ratios of one direction."""
    difference = d.negatives - d.anchors
    to_negative = (difference - SMALL).norm(dim=-1)
    easy = d.to_positive < to_negative
    return _Shares(difference, torch.where(easy, d.to_positive / to_negative, 1.0), to_negative, easy)


def _share(m: Mixing, d: _Direction, shares: _Shares) -> Tensor:
    """The shares r (A, Ka, O, Kb, D)."""
    return torch.addcmul(shares.ratio[..., None], (1 - shares.ratio)[..., None] * m.pull, d.theta)


def _mix(m: Mixing, d: _Direction, shares: _Shares) -> Tensor:
    """The negatives N (A, Ka, O, D) of one direction."""
    weighted = _share(m, d, shares) * shares.difference * m.kappa[:, None, :, None]
    return weighted.sum(dim=3) + d.anchors[:, :, :, 0]


class FusedMix(Mix):
    """The mix as fused ops."""

    def negatives(self, m: Mixing, tile: Tile, theta: Tensor) -> Tensor:
        out = self.context.wide("negatives", tile_mixes(self.schedule, tile), theta.shape[1])
        self.ops.mix_fwd_(self._inputs(m, tile), MixOutputs(theta, out, None, None))
        return out

    def logits(self, m: Mixing, tile: Tile, theta: Tensor, logits: Tensor, squares: Tensor) -> None:
        self.ops.mix_fwd_(self._inputs(m, tile), MixOutputs(theta, None, logits, squares))

    def backward_theta(self, m: Mixing, tile: Tile, dn: Tensor) -> Tensor:
        out = self.context.edge_scratch("dtheta", tile.rows)
        self.ops.mix_bwd_theta_(self._inputs(m, tile), MixThetaGradient(dn, out))
        return out

    def backward_z(
        self,
        m: Mixing,
        tile: Tile,
        upstream: MixUpstream,
        into: NodeSum,
        into_positive: NodeSum,
        *,
        anchors: bool = True,
    ) -> None:
        if not anchors:  # the op adds both at once
            super().backward_z(m, tile, upstream, into, into_positive, anchors=False)
            return
        gradients = MixNodeGradients(into.wrapped, into_positive.wrapped)
        self.ops.mix_bwd_z_(self._inputs(m, tile), upstream, gradients)

    def _inputs(self, m: Mixing, tile: Tile) -> MixInputs:
        return MixInputs(self.context.numbers(tile), m.z.wrapped, m.d_plus.wrapped, m.kappa, m.pull)
