"""The stages as fused ops: the row-wise work between two matrix products in one pass over memory. C++ on the CPU
(csrc/cpu), Triton kernels (kernels/)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gcahng.engine.auto import split
from gcahng.engine.head import DiversitySums, HeadGradients, HeadWeights, TorchHead
from gcahng.engine.masks import EdgeDropout
from gcahng.engine.mixing import TorchMixer
from gcahng.engine.schedule import Band, NodeSum, Schedule, Tile
from gcahng.engine.stages import Edges, Gate, RowMoments, Tokens, TokenSums, TorchStages
from gcahng.engine.weights import EdgeGradients, EdgeWeights, ToNodeWeights
from gcahng.engine.workspace import Workspace
from gcahng.ops import _stages  # noqa: F401  declares the ops
from gcahng.reference.philox import dropout_threshold


def stage_ops(impl: str) -> Any:
    """The ops of gcahng/ops/_stages.py, as an implementation has them; BASE,OP=IMPL…: some as another has them."""
    base, routes = split(impl)
    return _Routed(base, routes) if routes else _namespace(base)


def _namespace(impl: str) -> Any:
    return torch.ops.gcahng_triton if impl == "triton" else torch.ops.gcahng


class _Routed:
    def __init__(self, base: str, routes: dict[str, str]) -> None:
        self._base, self._routes = base, routes

    def __getattr__(self, op: str) -> Any:
        return getattr(_namespace(self._routes.get(op, self._base)), op)


def _numbers(schedule: Schedule, tile: Tile) -> Sequence[int]:
    """A tile as the ops take it."""
    return (
        tile.classes,
        schedule.views,
        tile.offsets,
        tile.first_class,
        tile.first_offset,
        tile.mirrored,
        schedule.classes,
    )


class FusedStages(TorchStages):
    """Matrix products stay torch's, into memory that is used again; ops: see stage_ops."""

    def __init__(
        self,
        schedule: Schedule,
        dim: int,
        compute: torch.dtype,
        like: Tensor,
        dropout: EdgeDropout | None,
        layers: int,
        workspace: Workspace,
        ops: Any,
    ) -> None:
        super().__init__(schedule, dim, compute, like, None, layers)
        self.workspace, self.ops = workspace, ops
        self.same = compute is like.dtype
        self._draw = dropout.draw if dropout else torch.zeros((), dtype=torch.int64, device=like.device)
        self._scale = 1 / (1 - dropout.p) if dropout else 1.0
        self._dropout = (dropout.seed, dropout_threshold(dropout.p)) if dropout else (0, 0)

    def scratch(self, slot: str, rows: int, width: int, wide: bool = False) -> Tensor:
        dtype = self.like.dtype if wide else self.compute
        return self.workspace.get(slot, rows, width, self.like, dtype)

    def _pair(self, slot: str, rows: int) -> Edges:
        full = self.scratch(slot, rows, self.dim, wide=True)
        return Edges(full, full if self.same else self.scratch(f"{slot} low", rows, self.dim))

    def _low(self, e: Edges) -> Tensor | None:
        return None if self.same else e.low

    def edge_start(self, tile: Tile, x: Band, slot: str) -> Edges:
        e = self._pair(slot, tile.rows)
        self.ops.edge_start_fwd_(_numbers(self.schedule, tile), x.wrapped, e.full, self._low(e))
        return e

    def edge_start_backward(self, tile: Tile, x: Band, de: Tensor, into: NodeSum) -> None:
        self.ops.edge_start_bwd_(_numbers(self.schedule, tile), x.wrapped, de, into.wrapped)

    def norm_gelu(self, w: EdgeWeights, t: Tensor, slot: str) -> Edges:
        e = self._pair(slot, t.shape[0])
        self.ops.norm_gelu_(t, w.gamma, w.beta, e.full, self._low(e))
        return e

    def edge_to_node(self, tile: Tile, w: ToNodeWeights, e: Edges, into: NodeSum) -> None:
        p = torch.mm(e.low, w.weight.T, out=self.scratch("p", tile.rows, self.dim))
        self.ops.edge_to_node_fwd_(_numbers(self.schedule, tile), p, w.bias, into.wrapped)

    def edge_to_node_backward(
        self,
        tile: Tile,
        w: ToNodeWeights,
        e: Edges,
        ds: Band,
        into: tuple[Tensor, Tensor] | None,
        de: Tensor | None,
    ) -> None:
        p = torch.mm(e.low, w.weight.T, out=self.scratch("p", tile.rows, self.dim))
        bias = None if into is None else into[1]
        self.ops.edge_to_node_bwd_(_numbers(self.schedule, tile), p, w.bias, ds.wrapped, p, bias)
        if into is not None:
            self._accumulate_product(into[0], p, e.low)
        if de is not None:
            self._add_product(de, p, w.weight)

    def _gate_inputs(self, layer: int, tile: Tile, tokens: Tokens) -> tuple:
        seed, threshold = self._dropout
        dropout = (seed, layer, threshold, int(self.schedule.symmetric))
        bands = (tokens.u.wrapped, tokens.c.wrapped, tokens.v.wrapped)
        return _numbers(self.schedule, tile), dropout, self._scale, self._draw, *bands

    def _gate_room(self, slot: str, rows: int) -> tuple[Edges, Gate]:
        e1 = self._pair(slot, rows)
        p, q = (self.scratch(f"{slot} {name}", rows, 1, wide=True) for name in "pq")
        return e1, Gate(None, p, q, None)

    def gate(
        self, layer: int, number: int, tile: Tile, w: EdgeWeights, tokens: Tokens, e: Edges, slot: str
    ) -> tuple[Edges, Gate]:
        e1, gate = self._gate_room(slot, tile.rows)
        inputs = self._gate_inputs(layer, tile, tokens)
        self.ops.gate_fwd_(*inputs, w.gamma, w.beta, e.full, e1.full, self._low(e1), gate.p, gate.q)
        return e1, gate

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
        sums: list[Tensor | None] = [None] * 5
        if into is not None:
            gradients, tokens_into = into
            sums = [x.wrapped for x in (tokens_into.u, tokens_into.c, tokens_into.v)]
            sums += [gradients.gamma, gradients.beta]
        inputs = self._gate_inputs(layer, tile, tokens)
        self.ops.gate_bwd_(*inputs, w.gamma, e.full, de1, gate.p, gate.q, de1 if want_edge else None, *sums)
        return de1 if want_edge else None

    def mlp_in(
        self, w: EdgeWeights, e1: Edges, keep_h: Tensor | None, keep_moments: RowMoments | None
    ) -> tuple[Tensor, RowMoments]:
        rows = e1.low.shape[0]
        g = self.scratch("g", rows, 4 * self.dim)
        moments = keep_moments or RowMoments(*(self.scratch(f"row {k}", rows, 1, wide=True) for k in range(2)))
        self._hidden(w, e1, keep_h, g, moments)
        return g, moments

    def mlp_out(
        self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, keep_s: Tensor | None, slot: str
    ) -> tuple[Tensor, Edges]:
        narrowed = keep_s is not None and keep_s.dtype is not self.like.dtype
        s = self.scratch("s", g.shape[0], self.dim, wide=True) if keep_s is None or narrowed else keep_s
        if narrowed:
            self._close(w, e1, g, moments, s, None)
            s.copy_(keep_s.copy_(s))
            return s, self.norm_gelu(w, s, slot)
        e = self._pair(slot, g.shape[0])
        self._close(w, e1, g, moments, s, e)
        return s, e

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
        rows = e1.low.shape[0]
        g, dh = (self.scratch(slot, rows, 4 * self.dim) for slot in ("g", "dn"))
        if h is None:
            h = torch.mm(e1.low, w.w1.T, out=g)
        low = d if self.same else self.scratch("ds low", rows, self.dim)
        scaled = self.scratch("ds scaled", rows, self.dim)
        means = tuple(self.scratch(f"mean {k}", rows, 1, wide=True) for k in range(2))
        sums = None if into is None else into.mlp_out_sums
        self.ops.mlp_out_bwd_(s, e1.full, d, *moments, w.w, w.d, w.gamma, d, low, scaled, *means, sums)
        self._mlp_in_backward(w, low, h, (*moments, *means), g, dh, None if into is None else into.b1)
        if into is not None:
            self._accumulate_product(into.out_g, scaled, g)
            self._accumulate_product(into.w1, dh, e1.low)
        self._add_product(d, dh, w.w1)
        return d

    # -- the edge MLP's products with what follows them

    def _hidden(self, w: EdgeWeights, e1: Edges, h: Tensor | None, g: Tensor, moments: RowMoments) -> None:
        """g and its row moments; h, if given, the product."""
        h = torch.mm(e1.low, w.w1.T, out=g if h is None else h)
        self.ops.mlp_in_fwd_(h, w.b1, g, *moments)

    def _close(self, w: EdgeWeights, e1: Edges, g: Tensor, moments: RowMoments, s: Tensor, e: Edges | None) -> None:
        """s, and the edges that leave if given."""
        product = torch.mm(g, w.w2.T, out=self.scratch("product", g.shape[0], self.dim))
        out = (None, None) if e is None else (e.full, self._low(e))
        self.ops.mlp_out_fwd_(product, e1.full, *moments, w.w, w.d, w.gamma, w.beta, s, *out)

    def _mlp_in_backward(
        self, w: EdgeWeights, ds: Tensor, h: Tensor, rows: tuple[Tensor, ...], g: Tensor, dh: Tensor, db: Tensor | None
    ) -> None:
        """g and dh (T, 4D) from ds (T, D); rows: mean and 1/σ, and the two means of LayerNorm's gradient."""
        torch.mm(ds, w.w2, out=dh)
        self.ops.mlp_in_bwd_(h, w.b1, dh, *rows, g, dh, db)

    def _add_product(self, into: Tensor, a: Tensor, b: Tensor) -> None:
        if into.dtype is a.dtype:
            into.addmm_(a, b)
        else:
            product = self.scratch("product", a.shape[0], b.shape[1])
            into += torch.mm(a, b, out=product)


class FusedHead(TorchHead):
    """The head's row-wise ends as fused ops."""

    def __init__(self, schedule: Schedule, compute: torch.dtype, like: Tensor, workspace: Workspace, ops: Any) -> None:
        super().__init__(schedule, compute)
        self.like, self.workspace, self.ops = like, workspace, ops

    def _scratch(self, slot: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return self.workspace.get(f"head {slot}", rows, width, self.like, dtype)

    def add_moments(self, tile: Tile, e: Edges, into: Tensor) -> None:
        self.ops.head_moments_(_numbers(self.schedule, tile), e.full, into)

    def head(self, w: HeadWeights, e: Edges, out: Tensor | None = None) -> Tensor:
        rows, dim = e.full.shape
        p = torch.mm(e.low, w.weight.T, out=self._scratch("p", rows, dim, self.compute))
        theta = self._scratch("theta", rows, dim, e.full.dtype) if out is None else out
        self.ops.head_fwd_(p, w.bias, theta)
        return theta

    def head_backward(
        self, w: HeadWeights, e: Edges, theta: Tensor, dtheta: Tensor, into: HeadGradients | None
    ) -> Tensor:
        rows, dim = theta.shape
        dpre = self._scratch("p", rows, dim, self.compute)
        self.ops.head_bwd_(theta, dtheta, dpre, None if into is None else into.pre)
        dy = torch.mm(dpre, w.weight_fc, out=self._scratch("dy", rows, dim, self.compute))
        if into is None:
            return dy.to(theta.dtype)
        into.pre_e += torch.mm(dpre.T, e.low)
        wide = self._scratch("theta", rows, dim, theta.dtype)
        self.ops.head_sums_(dy, e.full, wide, into.sums)
        return wide

    def norm_backward(self, tile: Tile, w: HeadWeights, e: Edges, dy: Tensor, sums: HeadGradients | None) -> Tensor:
        if sums is None:
            return dy * w.scale
        a, b = sums.sums / self.schedule.nodes**2
        self.ops.head_norm_(_numbers(self.schedule, tile), dy, e.full, w.scale, a, b, dy)
        return dy

    def add_diversity(self, tile: Tile, theta: Tensor, into: DiversitySums) -> None:
        self.ops.diversity_fwd_(_numbers(self.schedule, tile), theta, into.sum.wrapped, into.square.wrapped)

    def diversity_backward(self, tile: Tile, theta: Tensor, mean: Band, scale: Tensor, into: Tensor) -> None:
        self.ops.diversity_bwd_(_numbers(self.schedule, tile), theta, mean.wrapped, scale, into)


class FusedMixer(TorchMixer):
    """The mixing as fused ops."""

    def __init__(
        self, schedule: Schedule, z: Tensor, pull: Tensor, kappa: Tensor, workspace: Workspace, ops: Any
    ) -> None:
        super().__init__(schedule, z, pull.to(z.dtype), kappa)
        self.workspace, self.ops = workspace, ops

    def _inputs(self, tile: Tile) -> tuple:
        return _numbers(self.schedule, tile), self.z.wrapped, self.d_plus.wrapped, self.kappa, self.pull

    def _mixes(self, tile: Tile) -> int:
        return tile.classes * self.schedule.views * (2 * tile.offsets - tile.mirrored)

    def negatives(self, tile: Tile, theta: Tensor) -> Tensor:
        out = self.workspace.get("negatives", self._mixes(tile), theta.shape[1], theta)
        self.ops.mix_fwd_(*self._inputs(tile), theta, out, None, None)
        return out

    def logits(self, tile: Tile, theta: Tensor) -> tuple[Tensor, Tensor]:
        logits, squares = theta.new_empty(2, self._mixes(tile))
        self.ops.mix_fwd_(*self._inputs(tile), theta, None, logits, squares)
        return logits, squares

    def backward_theta(self, tile: Tile, dn: Tensor) -> Tensor:
        out = self.workspace.get("dtheta", tile.rows, dn.shape[1], dn)
        self.ops.mix_bwd_theta_(*self._inputs(tile), dn, out)
        return out

    def backward_z(
        self, tile: Tile, theta: Tensor, dlogits: Tensor, square: float, into: NodeSum, into_positive: NodeSum
    ) -> None:
        inputs = self._inputs(tile)
        self.ops.mix_bwd_z_(*inputs, theta, dlogits, square, into.wrapped, into_positive.wrapped)
