"""What happens to a tile's edges between two matrix products: plain torch on any device. Other implementations
override these.

Shapes: T edges of a tile, also seen as (A, K, O, K) (see schedule). Products are in the compute dtype; everything
else, the edges included, is in the accumulating dtype (fp32, or fp64). docs/math derives the backward of each stage.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.masks import EdgeDropout, MaskSource
from gcahng.engine.schedule import Band, NodeSum, Schedule, Tile
from gcahng.engine.weights import EdgeGradients, EdgeWeights, ToNodeWeights

NORM_EPS = 1e-5


class Edges(NamedTuple):
    """A tile's edges (T, D): full in the accumulating dtype, low as an operand of products (one tensor where they
    agree)."""

    full: Tensor
    low: Tensor


class Tokens(NamedTuple):
    """A layer's gate inputs, as bands: U (D wide), c (1 wide), V (D wide)."""

    u: Band
    c: Band
    v: Band


class TokenSums:
    """Gradients of U, c and V, summed over edges."""

    def __init__(self, schedule: Schedule, dim: int, like: Tensor) -> None:
        self.u = NodeSum(schedule, dim, like=like)
        self.c = NodeSum(schedule, 1, like=like)
        self.v = NodeSum(schedule, dim, like=like)


class Gate(NamedTuple):
    """What the gate's backward needs of its forward, whatever the implementation keeps (see its gate)."""

    keep: Tensor | None
    p: Tensor
    q: Tensor
    t: Tensor | None


class RowMoments(NamedTuple):
    """mean and 1/σ (T, 1) of each row's 4D hidden channels."""

    mean: Tensor
    rstd: Tensor


class Keep(NamedTuple):
    """What of an edge update is kept. gate: the slot of e¹ and of what the gate's backward needs; None: they are not.
    The others, where given, receive what `mlp_in` and `mlp_out` keep."""

    gate: str | None
    h: Tensor | None
    moments: RowMoments | None
    s: Tensor | None


class Update(NamedTuple):
    """What an edge update leaves; e1 and gate have a meaning where they were to be kept."""

    edges: Edges | None
    e1: Edges | None
    gate: Gate | None


class TorchStages:
    """Every stage in plain torch.

    slot: a name for the memory of a result; results of one slot overwrite each other in implementations with a
    workspace.
    """

    def __init__(
        self, schedule: Schedule, dim: int, compute: torch.dtype, like: Tensor, dropout: EdgeDropout | None, layers: int
    ) -> None:
        self.schedule, self.dim, self.compute, self.like = schedule, dim, compute, like
        self.masks = [MaskSource(schedule, layer, dropout, like.dtype) if dropout else None for layer in range(layers)]

    def scratch(self, slot: str, rows: int, width: int, wide: bool = False) -> Tensor:
        """Memory (rows, width) of the compute dtype, or (wide) of the accumulating one."""
        return self.like.new_empty(rows, width, dtype=self.like.dtype if wide else self.compute)

    # -- edge start: e⁰ = x̂_i ∘ x̂_j

    def edge_start(self, tile: Tile, x: Band, slot: str) -> Edges:
        """x̂ → e⁰ (T, D)."""
        product = x.rows(tile)[:, :, None, None] * x.columns(tile)[:, None]
        return self._edges(product.view(tile.rows, self.dim))

    def edge_start_backward(self, tile: Tile, x: Band, de: Tensor, into: NodeSum) -> None:
        """Adds both ends' parts of dx̂, given de (T, D)."""
        de = self._grid(tile, de)
        into.add_rows(tile, (de * x.columns(tile)[:, None]).sum(dim=(2, 3)))
        into.add_columns(tile, (de * x.rows(tile)[:, :, None, None]).sum(dim=1))

    # -- norm: LayerNorm(GELU(·)), behind the gate and behind the MLP

    def norm_gelu(self, w: EdgeWeights, t: Tensor, slot: str) -> Edges:
        return self._edges(F.layer_norm(F.gelu(t), (self.dim,), w.gamma, w.beta, NORM_EPS))

    def _norm_gelu_backward(self, w: EdgeWeights, t: Tensor, dy: Tensor, into: EdgeGradients | None) -> Tensor:
        """d of the pre-norm sum t (T, D), given dy (T, D)."""
        g = F.gelu(t)
        variance, mean = torch.var_mean(g, dim=1, correction=0, keepdim=True)
        rstd = torch.rsqrt(variance + NORM_EPS)
        normalised = g.sub_(mean).mul_(rstd)
        if into is not None:
            into.gamma += (dy * normalised).sum(dim=0)
            into.beta += dy.sum(dim=0)
        dn = dy * w.gamma
        along = (dn * normalised).mean(dim=1, keepdim=True)
        dn.sub_(dn.mean(dim=1, keepdim=True)).sub_(normalised.mul_(along)).mul_(rstd)
        return torch.ops.aten.gelu_backward(dn, t)

    # -- edge to node: S_i = Σ_j GELU(W_e e_ij + b_e)

    def edge_to_node(self, tile: Tile, w: ToNodeWeights, e: Edges, into: NodeSum) -> None:
        g = self._grid(tile, F.gelu(F.linear(e.low, w.weight, w.bias.to(self.compute))))
        accumulate = self.like.dtype
        into.add_rows(tile, g.sum(dim=(2, 3), dtype=accumulate))
        if tile.mirrored < tile.offsets:
            into.add_columns(tile, g[:, :, tile.mirrored :].sum(dim=1, dtype=accumulate), skip=tile.mirrored)

    def edge_to_node_backward(
        self,
        tile: Tile,
        w: ToNodeWeights,
        e: Edges,
        ds: Band,
        into: tuple[Tensor, Tensor] | None,
        de: Tensor | None,
    ) -> None:
        """ds: gradient of S, as a band. Adds to de (T, D) if given; the parameters' gradients to into = (weight,
        bias)."""
        p = F.linear(e.low, w.weight, w.bias.to(self.compute)).to(self.like.dtype)
        both = ds.rows(tile)[:, :, None, None].expand(*self.schedule.shape(tile), self.dim).contiguous()
        if tile.mirrored < tile.offsets:
            both[:, :, tile.mirrored :] += ds.columns(tile)[:, None, tile.mirrored :]
        dp = torch.ops.aten.gelu_backward(both.view(tile.rows, self.dim), p)
        if into is not None:
            into[1].add_(dp.sum(dim=0))
        dp = dp.to(self.compute)
        if into is not None:
            self._accumulate_product(into[0], dp, e.low)
        if de is not None:
            self._add_product(de, dp, w.weight)

    # -- gate: attention of an edge to its two tokens

    def gate(
        self, layer: int, number: int, tile: Tile, w: EdgeWeights, tokens: Tokens, e: Edges, slot: str
    ) -> tuple[Edges, Gate]:
        """e → e¹ (T, D) and what its backward needs: keep (A, K, O, K, 2), p and 1 - p (A, K, O, K), the pre-norm sum
        t (T, D)."""
        keep = self.masks[layer](number) if self.masks[layer] is not None else None
        grid = self._grid(tile, e.full)
        anchors, views, offsets, _ = self.schedule.shape(tile)
        rows = e.full.view(anchors, views, offsets * views, self.dim)
        along_i = torch.matmul(rows, tokens.u.rows(tile)[..., None]).view(anchors, views, offsets, views)
        along_j = (grid * tokens.u.columns(tile)[:, None]).sum(dim=-1)
        c_i, c_j = tokens.c.rows(tile)[..., None], tokens.c.columns(tile)[:, None, ..., 0]
        logit = (along_i - along_j + (c_i - c_j)) * self.dim**-0.5
        p, q = torch.sigmoid(logit), torch.sigmoid(-logit)
        weight_i, weight_j = self._kept(keep, p, q)
        t = torch.addcmul(grid, weight_i[..., None], tokens.v.rows(tile)[:, :, None, None])
        t.addcmul_(weight_j[..., None], tokens.v.columns(tile)[:, None])
        t = t.view(tile.rows, self.dim)
        return self.norm_gelu(w, t, slot), Gate(keep, p, q, t)

    def gate_backward(
        self,
        layer: int,
        number: int,
        tile: Tile,
        w: EdgeWeights,
        tokens: Tokens,
        e: Edges,
        gate: Gate,
        de1: Tensor,
        into: tuple[EdgeGradients, TokenSums] | None,
        want_edge: bool,
    ) -> Tensor | None:
        """de¹ (T, D) → de (T, D) if wanted; parameter and token gradients are added to `into` if given."""
        grid = self._grid(tile, e.full)
        dt = self._grid(tile, self._norm_gelu_backward(w, gate.t, de1, into and into[0]))
        v_i, v_j = tokens.v.rows(tile)[:, :, None, None], tokens.v.columns(tile)[:, None]
        dp, dq = self._kept(gate.keep, (dt * v_i).sum(dim=-1), (dt * v_j).sum(dim=-1))
        dlogit = (dp - dq) * (gate.p * gate.q) * self.dim**-0.5
        if into is not None:
            sums = into[1]
            weight_i, weight_j = self._kept(gate.keep, gate.p, gate.q)
            scaled = dlogit[..., None] * grid
            sums.u.add_rows(tile, scaled.sum(dim=(2, 3)))
            sums.u.add_columns(tile, -scaled.sum(dim=1))
            sums.c.add_rows(tile, dlogit.sum(dim=(2, 3))[..., None])
            sums.c.add_columns(tile, -dlogit.sum(dim=1)[..., None])
            sums.v.add_rows(tile, (dt * weight_i[..., None]).sum(dim=(2, 3)))
            sums.v.add_columns(tile, (dt * weight_j[..., None]).sum(dim=1))
        if not want_edge:
            return None
        difference = tokens.u.rows(tile)[:, :, None, None] - tokens.u.columns(tile)[:, None]
        return dt.addcmul_(dlogit[..., None], difference).view(tile.rows, self.dim)

    @staticmethod
    def _kept(keep: Tensor | None, at_i: Tensor, at_j: Tensor) -> tuple[Tensor, Tensor]:
        return (at_i, at_j) if keep is None else (at_i * keep[..., 0], at_j * keep[..., 1])

    # -- mlp_in and mlp_out: the edge MLP

    def mlp_in(
        self, w: EdgeWeights, e1: Edges, keep_h: Tensor | None, keep_moments: RowMoments | None
    ) -> tuple[Tensor, RowMoments]:
        """e¹ → g = GELU(e¹ W₁ᵀ + b₁) (T, 4D) in the compute dtype, and its row moments. keep_h (T, 4D) and
        keep_moments, if given, receive what mlp_backward takes as h and moments."""
        h = torch.addmm(w.b1.to(self.compute), e1.low, w.w1.T)
        if keep_h is not None:
            keep_h.copy_(h)
        g = F.gelu(h)
        variance, mean = torch.var_mean(g.to(self.like.dtype), dim=1, correction=0, keepdim=True)
        moments = RowMoments(mean, torch.rsqrt(variance + NORM_EPS))
        if keep_moments is not None:
            keep_moments.mean.copy_(moments.mean)
            keep_moments.rstd.copy_(moments.rstd)
        return g, moments

    def mlp_out(
        self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, keep_s: Tensor | None, slot: str
    ) -> tuple[Tensor, Edges]:
        """The pre-norm sum s = (g W₂'ᵀ - μ w)/σ + d + e¹ (T, D), and the edges LayerNorm(GELU(s)). keep_s (T, D), if
        given, receives s, and s is then as it was kept."""
        s = torch.mm(g, w.w2.T).to(self.like.dtype)
        s.addcmul_(moments.mean, w.w, value=-1).mul_(moments.rstd).add_(w.d).add_(e1.full)
        if keep_s is not None:
            keep_s.copy_(s)
            s = keep_s.to(s.dtype)
        return s, self.norm_gelu(w, s, slot)

    def update(
        self,
        layer: int,
        number: int,
        tile: Tile,
        w: EdgeWeights,
        closing: EdgeWeights,
        tokens: Tokens,
        e: Edges,
        keep: Keep,
        slot: str,
        sums: Tensor | None = None,
    ) -> Update:
        """`gate` with w, `mlp_in` and `mlp_out` with closing, together: e → the edges that leave the layer, which may
        be in e's own slot, and what is to be kept. sums (2, D) float64: given where nothing but BatchNorm's moments is
        wanted of these edges; an implementation that adds them itself (as TorchHead.add_moments) has no edges then."""
        e1, gate = self.gate(layer, number, tile, w, tokens, e, keep.gate or "e1")
        g, moments = self.mlp_in(closing, e1, keep.h, keep.moments)
        return Update(self.mlp_out(closing, e1, g, moments, keep.s, slot)[1], e1, gate)

    def mlp_backward(
        self,
        w: EdgeWeights,
        e1: Edges,
        s: Tensor,
        d: Tensor,
        h: Tensor | None,
        moments: RowMoments,
        into: EdgeGradients | None,
    ) -> Tensor:
        """Gradient d (T, D) of LayerNorm(GELU(s)) → de¹ (T, D). h (T, 4D): what `mlp_in` kept, or None to replay its
        product."""
        ds = self._norm_gelu_backward(w, s, d, into)
        if h is None:
            h = torch.addmm(w.b1.to(self.compute), e1.low, w.w1.T)
        g = F.gelu(h)
        mean, rstd = moments
        # LayerNorm's two row means, from D-vectors: n·dn = ds·(O - d) with O - d = s - e¹ - d.
        mean_dn = (ds @ w.w)[:, None] / (4 * self.dim)
        mean_n_dn = (ds * (s - e1.full - w.d)).sum(dim=1, keepdim=True) / (4 * self.dim)
        dn = torch.mm(ds.to(self.compute), w.w2)
        dg = (dn - mean_dn - (g - mean) * (rstd * mean_n_dn)) * rstd
        dh = torch.ops.aten.gelu_backward(dg, h.to(dg.dtype))
        if into is not None:
            scaled = ds * rstd
            self._accumulate_product(into.out_g, scaled.to(self.compute), g)
            into.out_mean += (scaled * mean).sum(dim=0)
            into.out += ds.sum(dim=0)
            into.b1 += dh.sum(dim=0)
        dh = dh.to(self.compute)
        if into is not None:
            self._accumulate_product(into.w1, dh, e1.low)
        self._add_product(ds, dh, w.w1)
        return ds

    # -- products

    def _edges(self, full: Tensor) -> Edges:
        return Edges(full, full.to(self.compute))

    def _accumulate_product(self, into: Tensor, a: Tensor, b: Tensor) -> None:
        """into += aᵀ b"""
        self._add_product(into, a.T, b)

    def _add_product(self, into: Tensor, a: Tensor, b: Tensor) -> None:
        """into += a b"""
        if into.dtype is a.dtype:
            into.addmm_(a, b)
        else:
            into += torch.mm(a, b)

    def _grid(self, tile: Tile, x: Tensor) -> Tensor:
        return x.view(*self.schedule.shape(tile), x.shape[-1])
