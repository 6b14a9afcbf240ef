"""Inputs for single stages, and each stage's results over a whole schedule, for any implementation and precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from gcahng.engine.head import DiversitySums, HeadGradients, HeadWeights
from gcahng.engine.mixing import mix_index, mixing_weights
from gcahng.engine.parts import make_parts
from torch import Tensor

from gcahng.engine.masks import EdgeDropout
from gcahng.engine.schedule import Band, NodeSum, Schedule, Tile, make_schedule
from gcahng.engine.stages import Edges, Keep, RowMoments, Tokens, TokenSums
from gcahng.engine.weights import EdgeGradients, EdgeWeights, ToNodeWeights
from gcahng.engine.workspace import Workspace
from gcahng.testing import seeded

Results = dict[str, Tensor]
_MARGIN, _CANARY = 64, 7.0


class PoisonedWorkspace(Workspace):
    """Every buffer is new, full of NaN, and followed by values that nothing may overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[str, Tensor]] = []

    def get(self, name: str, rows: int, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        buffer = torch.full((rows * width + _MARGIN,), float("nan"), dtype=dtype or like.dtype)
        buffer[-_MARGIN:] = _CANARY
        self._made.append((name, buffer))
        return buffer[:-_MARGIN].view(rows, width)

    @property
    def names(self) -> set[str]:
        """Of what was asked for."""
        return {name for name, _ in self._made}

    def check(self) -> None:
        for name, buffer in self._made:
            assert bool((buffer[-_MARGIN:] == _CANARY).all()), f"{name} was written past its end"


class Precision(NamedTuple):
    """accumulate: of vectors and edges; compute: of products."""

    accumulate: torch.dtype
    compute: torch.dtype


PRECISIONS = {
    "float64": Precision(torch.float64, torch.float64),
    "float32": Precision(torch.float32, torch.float32),
    "bfloat16": Precision(torch.float32, torch.bfloat16),
    "float16": Precision(torch.float32, torch.float16),  # the low path in Triton's interpreter
}


@dataclass(frozen=True)
class Setup:
    """C classes of K views in tiles; p of dropout, or 0."""

    classes: int
    views: int
    dim: int
    tile_rows: int
    symmetric: bool = True
    p: float = 0.0

    def __str__(self) -> str:
        ends = "tied" if self.symmetric else "apart"
        return f"c{self.classes}-k{self.views}-d{self.dim}-t{self.tile_rows}-{ends}-p{self.p}"

    @property
    def schedule(self) -> Schedule:
        return make_schedule(self.classes, self.views, symmetric=self.symmetric, tile_rows=self.tile_rows)

    @property
    def dropout(self) -> EdgeDropout | None:
        return EdgeDropout(self.p, 7, torch.tensor(3)) if self.p else None


@dataclass(frozen=True)
class Some(Setup):
    """Some tiles of a schedule: (first class, classes, first offset, offsets, mirrored) each."""

    tiles: tuple[tuple[int, ...], ...] = ()

    @property
    def schedule(self) -> Schedule:
        tiles, rows = [], 0
        for tile in self.tiles:
            count = tile[1] * tile[3] * self.views**2
            tiles.append(Tile(*tile, rows, count))
            rows += count
        return Schedule(self.classes, self.views, self.symmetric, tuple(tiles))


# Classes odd and even, tiles of one class and of several, offsets in one unit of work and in many, odd channels, long
# sums over rows and over channels.
SETUPS = [
    Setup(6, 3, 19, 40, p=0.3),
    Setup(7, 2, 64, 150),
    Setup(5, 3, 130, 130, symmetric=False, p=0.5),
    Setup(4, 8, 33, 1000, p=0.1),
    Setup(40, 2, 48, 500),
    Setup(50, 3, 24, 10_000),
    Setup(2, 5, 67, 9, p=0.2),
    Setup(4, 3, 512, 100),
]


class Inputs(NamedTuple):
    """What the stages of one setup take; edges, their gradients and θ have the rows of a whole schedule."""

    nodes: Tensor
    weights: EdgeWeights
    to_node: ToNodeWeights
    head: HeadWeights
    head_sums: Tensor
    tokens: tuple[Tensor, Tensor, Tensor]
    edges: Edges
    upstream: Tensor
    node_upstream: Tensor
    theta: Tensor
    kappa: Tensor
    logits_upstream: Tensor
    mix_upstream: Tensor
    closing: EdgeWeights


def make_inputs(setup: Setup, precision: Precision) -> Inputs:
    schedule, dim = setup.schedule, setup.dim
    n, rows, count = schedule.nodes, schedule.rows, iter(range(100))
    mixes = sum(len(mix_index(schedule, tile, torch.device("cpu")).view) for tile in schedule.tiles)

    def draw(*shape: int, scale: float = 1.0, at: float = 0.0, low: bool = False) -> Tensor:
        x = at + scale * seeded(*shape, seed=next(count), dtype=torch.float32)
        return x.to(precision.compute if low else precision.accumulate)

    w1, w2 = draw(4 * dim, dim, scale=dim**-0.5, low=True), draw(dim, 4 * dim, scale=0.5 * dim**-0.5, low=True)
    weights = EdgeWeights(
        w1=w1,
        b1=draw(4 * dim, scale=0.3),
        w2=w2,
        w=w2.to(precision.accumulate).sum(dim=1),
        d=draw(dim, scale=0.3),
        gamma=draw(dim, scale=0.3, at=1.0),
        beta=draw(dim, scale=0.3),
    )
    gamma, rstd = draw(dim, scale=0.3, at=1.0), draw(dim, at=2.0, scale=0.1)
    fc = draw(dim, dim, scale=dim**-0.5)
    head = HeadWeights(
        weight=(fc * gamma).to(precision.compute),
        bias=draw(dim, scale=0.3),
        weight_fc=fc.to(precision.compute),
        gamma=gamma,
        beta=draw(dim),
        mean=draw(dim),
        rstd=rstd,
        scale=gamma * rstd,
    )
    full = draw(rows, dim)
    return Inputs(
        nodes=draw(n, dim),
        weights=weights,
        to_node=ToNodeWeights(draw(dim, dim, scale=dim**-0.5, low=True), draw(dim, scale=0.3)),
        head=head,
        head_sums=draw(2, dim, scale=n),
        tokens=(draw(n, dim), draw(n, 1), draw(n, dim)),
        edges=Edges(full, full.to(precision.compute)),
        upstream=draw(rows, dim),
        node_upstream=draw(n, dim),
        theta=torch.sigmoid(draw(rows, dim)),
        kappa=mixing_weights(torch.sigmoid(draw(setup.views, setup.views - 1))),
        logits_upstream=draw(mixes),
        mix_upstream=draw(mixes, dim),
        closing=weights._replace(gamma=draw(dim, scale=0.3, at=1.0), beta=draw(dim, scale=0.3)),
    )


def mapped(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """function of every tensor, also inside tuples."""
    if isinstance(x, Tensor):
        return function(x)
    parts = [mapped(function, part) for part in x]
    return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)


class Run:
    """One implementation of the stages on one setup: each method → a stage's results over all tiles."""

    def __init__(self, setup: Setup, precision: Precision, inputs: Inputs, impl: str) -> None:
        self.schedule, self.dim, self.inputs = setup.schedule, setup.dim, inputs
        like = torch.zeros((), dtype=precision.accumulate)
        self.like, self.workspace = like, PoisonedWorkspace()
        pull = torch.tensor(0.625, dtype=precision.accumulate)
        mixing = (inputs.nodes, pull, inputs.kappa)
        parts = make_parts(impl, self.schedule, precision.compute, *mixing, setup.dropout, 2, self.workspace)
        self.stages, self.head, self.mixer, self.judge = parts
        self.tokens = Tokens(*(Band(self.schedule, x) for x in inputs.tokens))

    def tiles(self):
        """(number, tile, a tile's rows of a tensor over all edges, copied)."""
        for number, tile in enumerate(self.schedule.tiles):
            yield number, tile, lambda x, t=tile: x[t.first_row : t.first_row + t.rows].clone()

    def edges(self, rows) -> Edges:
        full = rows(self.inputs.edges.full)
        return Edges(full, full if self.inputs.edges.low.dtype is full.dtype else rows(self.inputs.edges.low))

    def edge_start(self) -> Results:
        found = Collected()
        for _, tile, _ in self.tiles():
            e = self.stages.edge_start(tile, Band(self.schedule, self.inputs.nodes), "in")
            found.add(e=e.full, low=e.low)
        return found.results()

    def edge_start_backward(self) -> Results:
        x, into = Band(self.schedule, self.inputs.nodes), NodeSum(self.schedule, self.dim, like=self.like)
        for _, tile, rows in self.tiles():
            self.stages.edge_start_backward(tile, x, rows(self.inputs.upstream), into)
        return {"dx": into.total()}

    def norm_gelu(self) -> Results:
        found = Collected()
        for _, _, rows in self.tiles():
            e = self.stages.norm_gelu(self.inputs.weights, rows(self.inputs.edges.full), "in")
            found.add(e=e.full, low=e.low)
        return found.results()

    def edge_to_node(self) -> Results:
        into = NodeSum(self.schedule, self.dim, like=self.like)
        for _, tile, rows in self.tiles():
            self.stages.edge_to_node(tile, self.inputs.to_node, self.edges(rows), into)
        return {"sum": into.total()}

    def edge_to_node_backward(self) -> Results:
        found, band = Collected(), Band(self.schedule, self.inputs.node_upstream)
        weight, bias = self.like.new_zeros(self.dim, self.dim), self.like.new_zeros(self.dim)
        for number, tile, rows in self.tiles():
            de = rows(self.inputs.upstream)
            into = (weight, bias) if number != 1 else None  # as where a replay needs de alone
            self.stages.edge_to_node_backward(tile, self.inputs.to_node, self.edges(rows), band, into, de)
            found.add(de=de)
        return found.results() | {"weight": weight, "bias": bias}

    def gate(self) -> Results:
        found = Collected()
        for number, tile, rows in self.tiles():
            e1, gate = self.stages.gate(1, number, tile, self.inputs.weights, self.tokens, self.edges(rows), "e1")
            found.add(e1=e1.full, low=e1.low, p=gate.p.reshape(-1), q=gate.q.reshape(-1))
        return found.results()

    def gate_backward(self) -> Results:
        found, w = Collected(), self.inputs.weights
        gradients, sums = EdgeGradients(self.dim, self.like), TokenSums(self.schedule, self.dim, self.like)
        for number, tile, rows in self.tiles():
            e = self.edges(rows)
            _, gate = self.stages.gate(1, number, tile, w, self.tokens, e, "e1")
            for into, want_edge in (((gradients, sums), False), (None, True)):
                de1 = rows(self.inputs.upstream)
                de = self.stages.gate_backward(1, number, tile, w, self.tokens, e, gate, de1, into, want_edge)
                assert (de is None) is not want_edge
            found.add(de=de)
            de1 = rows(self.inputs.upstream)
            both = self.stages.gate_backward(1, number, tile, w, self.tokens, e, gate, de1, (gradients, sums), True)
            assert torch.equal(both, de), "de does not depend on whether sums are wanted"
        named = {"du": sums.u.total(), "dc": sums.c.total(), "dv": sums.v.total()}
        return found.results() | named | {"dgamma": gradients.gamma, "dbeta": gradients.beta}

    def attention_between_classes(self) -> Results:
        """The gate's p and q, and what tokens get of its backward, without the edges of a class with itself."""
        found, w = Collected(), self.inputs.weights
        sums, gradients = TokenSums(self.schedule, self.dim, self.like), EdgeGradients(self.dim, self.like)
        for number, tile, rows in self.tiles():
            if tile.first_offset > 0:
                e = self.edges(rows)
                _, gate = self.stages.gate(1, number, tile, w, self.tokens, e, "e1")
                found.add(p=gate.p.reshape(-1), q=gate.q.reshape(-1))
                de1 = rows(self.inputs.upstream)
                self.stages.gate_backward(1, number, tile, w, self.tokens, e, gate, de1, (gradients, sums), False)
        return found.results() | {"du": sums.u.total(), "dc": sums.c.total()}

    def mlp(self) -> Results:
        """mlp_in and mlp_out."""
        found, w = Collected(), self.inputs.weights
        for number, _, rows in self.tiles():
            e1 = self.edges(rows)
            kept = RowMoments(*(torch.full((len(e1.full), 1), torch.nan, dtype=self.like.dtype) for _ in range(2)))
            h = torch.full((len(e1.full), 4 * self.dim), torch.nan, dtype=e1.low.dtype)
            keep = (h, kept) if number else (None, None)
            g, moments = self.stages.mlp_in(w, e1, *keep)
            if number:
                assert all(torch.equal(a, b) for a, b in zip(kept, moments, strict=True))
                assert h.isfinite().all()
            keep_s = torch.full_like(e1.full, torch.nan) if number else None
            s, e = self.stages.mlp_out(w, e1, g, moments, keep_s, "out")
            if number:
                assert torch.equal(keep_s, s)
            found.add(g=g, mean=moments.mean, rstd=moments.rstd, s=s, e=e.full, low=e.low)
        return found.results()

    def update(self) -> Results:
        """gate, mlp_in and mlp_out as one stage, which keeps what it is asked to; BatchNorm's moments of its edges."""
        found, w, closing = Collected(), self.inputs.weights, self.inputs.closing
        moments, of_edges = (self.head.moments(self.dim, self.like) for _ in range(2))
        for number, tile, rows in self.tiles():
            count = tile.rows
            h = torch.full((count, 4 * self.dim), torch.nan, dtype=w.w1.dtype)
            kept = RowMoments(*(torch.full((count, 1), torch.nan, dtype=self.like.dtype) for _ in range(2)))
            s = torch.full((count, self.dim), torch.nan, dtype=self.like.dtype)

            given = (1, number, tile, w, closing, self.tokens, self.edges(rows))
            e, e1, gate = self.stages.update(*given, Keep("e1", h, kept, s), "out")
            assert h.isfinite().all()
            found.add(e1=e1.full, e1_low=e1.low, p=gate.p.reshape(-1), q=gate.q.reshape(-1))
            found.add(mean=kept.mean, rstd=kept.rstd, s=s, e=e.full, low=e.low)
            # Where h is kept it may be another kernel.
            e, _, _ = self.stages.update(*given, Keep(None, None, None, s), "again")
            found.add(s_again=s, e_again=e.full, low_again=e.low)
            self.head.add_moments(tile, e, of_edges)
            e, _, _ = self.stages.update(*given, Keep(None, None, kept if number else None, None), "last", moments)
            if e is not None:
                self.head.add_moments(tile, e, moments)
            low = torch.full(s.shape, torch.nan, dtype=torch.float16)  # bf16 is beyond Triton's interpreter
            e, _, _ = self.stages.update(*given, Keep(None, None, None, low), "stored")
            assert torch.equal(low, s.half())
            wanted = self.stages.norm_gelu(closing, low.to(s.dtype), "wanted").full
            torch.testing.assert_close(e.full, wanted, rtol=0, atol=8 * torch.finfo(s.dtype).eps * wanted.abs().max())
        torch.testing.assert_close(moments, of_edges, rtol=1e-13, atol=1e-13 * of_edges.abs().max().item())
        return found.results()

    def stored_in_bfloat16(self) -> Results:
        """Stored in bf16: what goes on is what was stored."""
        found, w = Collected(), self.inputs.weights
        for _, _, rows in self.tiles():
            e1 = self.edges(rows)
            keep = torch.full(e1.full.shape, torch.nan, dtype=torch.bfloat16)
            s, e = self.stages.mlp_out(w, e1, *self.stages.mlp_in(w, e1, None, None), keep, "out")
            assert torch.equal(s, keep.to(s.dtype))
            again = self.stages.norm_gelu(w, s.clone(), "again")
            assert torch.equal(again.full, e.full) and torch.equal(again.low, e.low)
            found.add(kept=keep)
        return found.results()

    def mlp_backward(self, s: Tensor) -> Results:
        """s: the pre-norm sums that belong to the edges."""
        found, w = Collected(), self.inputs.weights
        gradients = EdgeGradients(self.dim, self.like)
        for number, _, rows in self.tiles():
            e1 = self.edges(rows)
            h = torch.empty(len(e1.full), 4 * self.dim, dtype=e1.low.dtype)
            _, moments = self.stages.mlp_in(w, e1, h, None)
            moments = RowMoments(moments.mean.clone(), moments.rstd.clone())
            d = self.stages.mlp_backward(w, e1, rows(s), rows(self.inputs.upstream), h, moments, None)
            found.add(de1=d)
            h = None if number else h
            d = self.stages.mlp_backward(w, e1, rows(s), rows(self.inputs.upstream), h, moments, gradients)
            found.add(de1_again=d)
        names = ("w1", "b1", "out_g", "out", "out_mean", "gamma", "beta")
        return found.results() | {name: getattr(gradients, name) for name in names}

    def head_forward(self) -> Results:
        found = Collected()
        for number, _, rows in self.tiles():
            e = self.edges(rows)
            out = torch.full_like(e.full, torch.nan) if number else None
            theta = self.head.head(self.inputs.head, e, out)
            assert out is None or theta.data_ptr() == out.data_ptr()
            found.add(theta=theta)
        return found.results()

    def head_backward(self) -> Results:
        found, gradients = Collected(), HeadGradients(self.dim, self.like)
        for _, _, rows in self.tiles():
            arguments = (self.inputs.head, self.edges(rows), rows(self.inputs.theta), rows(self.inputs.upstream))
            alone = self.head.head_backward(*arguments, None).clone()
            dy = self.head.head_backward(*arguments, gradients)
            assert torch.equal(alone, dy)
            found.add(dy=dy)
        return found.results() | {"pre_e": gradients.pre_e, "pre": gradients.pre, "sums": gradients.sums}

    def norm_backward(self) -> Results:
        found, sums = Collected(), HeadGradients(self.dim, self.like)
        sums.sums.copy_(self.inputs.head_sums)
        for _, tile, rows in self.tiles():
            for name, given in (("training", sums), ("eval", None)):
                dy = rows(self.inputs.upstream)
                found.add(**{name: self.head.norm_backward(tile, self.inputs.head, self.edges(rows), dy, given)})
        return found.results()

    def add_moments(self) -> Results:
        into = self.head.moments(self.dim, self.like)
        for _, tile, rows in self.tiles():
            self.head.add_moments(tile, self.edges(rows), into)
        return {"moments": into}

    def diversity(self) -> Results:
        found, sums = Collected(), DiversitySums(self.schedule, self.dim, self.like)
        mean, scale = Band(self.schedule, self.inputs.node_upstream), torch.full_like(self.like, -0.375)
        for _, tile, rows in self.tiles():
            dtheta = rows(self.inputs.upstream)
            self.head.diversity_backward(tile, rows(self.inputs.theta), mean, scale, dtheta)
            self.head.add_diversity(tile, rows(self.inputs.theta), sums)
            found.add(dtheta=dtheta)
        return found.results() | {"sum": sums.sum.total(), "square": sums.square.total()}

    def mixing(self) -> Results:
        found, place = Collected(), 0
        into, positive = (NodeSum(self.schedule, width, like=self.like) for width in (self.dim, 1))
        for _, tile, rows in self.tiles():
            theta = rows(self.inputs.theta)
            negatives = self.mixer.negatives(tile, theta)
            part = slice(place, place + len(negatives))
            place += len(negatives)
            logits, squares = self.mixer.logits(tile, theta)
            dtheta = self.mixer.backward_theta(tile, self.inputs.mix_upstream[part].clone())
            found.add(negatives=negatives, logits=logits, squares=squares, dtheta=dtheta)
            self.mixer.backward_z(tile, theta, self.inputs.logits_upstream[part].clone(), 0.375, into, positive)
        return found.results() | {"dz": into.total(), "d_positive": positive.total()}

    def judging(self) -> Results:
        """What becomes of negatives: cross entropy under a classifier of 4D classes, and likeness to their anchors."""
        found, place, w = Collected(), 0, self.inputs.weights
        for number, tile, _ in self.tiles():
            index = mix_index(self.schedule, tile, self.like.device)
            part = slice(place, place + len(index.view))
            place = part.stop
            negatives = self.inputs.mix_upstream[part].clone()
            low = negatives.to(w.w1.dtype)
            loss, d = self.judge.cross_entropy(self.judge.logits(low, w.w1), w.b1, index.negative, 0.125, True)
            again, none = self.judge.cross_entropy(self.judge.logits(low, w.w1), w.b1, index.negative, 0.125, False)
            assert torch.equal(again, loss) and none is None
            counted, dn = index.anchor != index.negative, self.inputs.mix_upstream[part].flip(0)
            inputs = (self.inputs.nodes, index.node, negatives, counted, 0.25)
            away = self.judge.similarity(*inputs, dn if number != 1 else None)
            found.add(loss=loss, d=d, away=away, dn=dn)
        return found.results()


class Collected:
    """Results of tiles, side by side."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self._parts.setdefault(name, []).append(tensor.detach().clone())

    def results(self) -> Results:
        return {name: torch.cat(parts) for name, parts in self._parts.items()}
