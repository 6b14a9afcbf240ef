"""Setups of the stages' tests, their inputs, and an implementation's stages on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.masks import EdgeDropout
from gcahng.engine.schedule import Band, NodeSum, Schedule, Tile, make_schedule
from gcahng.engine.stages import make_stages
from gcahng.engine.stages.common import Edges, StageContext
from gcahng.engine.stages.gate import Layer, Tokens
from gcahng.engine.stages.head import HeadWeights
from gcahng.engine.stages.mix import mixing_of, mixing_weights
from gcahng.engine.stages.mix_index import mix_index
from gcahng.engine.weights import EdgeWeights, ToNodeWeights
from gcahng.engine.workspace import Workspace
from gcahng.testing import seeded

Results = dict[str, Tensor]
Rows = Callable[[Tensor], Tensor]
_MARGIN, _CANARY = 64, 7.0
NARROW = "narrow"


class Precision(NamedTuple):
    """The dtypes of a case.

    Attributes:
        accumulate: that of vectors.
        compute: that of products.
        edges: that of edges, their gradients and coefficients; None: that of vectors.
    """

    accumulate: torch.dtype
    compute: torch.dtype
    edges: torch.dtype | None = None


PRECISIONS = {
    "float64": Precision(torch.float64, torch.float64),
    "float32": Precision(torch.float32, torch.float32),
    "bfloat16": Precision(torch.float32, torch.bfloat16),
    "float16": Precision(torch.float32, torch.float16),
    NARROW: Precision(torch.float32, torch.bfloat16, torch.bfloat16),
}


@dataclass(frozen=True)
class Setup:
    """C classes of K views with D channels, in tiles of at most tile_rows edges; p of dropout, or 0 without it."""

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


@dataclass(frozen=True)
class Some(Setup):
    """Some tiles of a schedule, each as (first class, classes, first offset, offsets, mirrored)."""

    tiles: tuple[tuple[int, ...], ...] = ()

    @property
    def schedule(self) -> Schedule:
        tiles, rows = [], 0
        for tile in self.tiles:
            count = tile[1] * tile[3] * self.views**2
            tiles.append(Tile(*tile, rows, count))
            rows += count
        return Schedule(self.classes, self.views, self.symmetric, tuple(tiles))


class Inputs(NamedTuple):
    """What the stages of one setup take; edges, their gradients and θ have the rows of a whole schedule.

    Attributes:
        edges: e, or e¹.
        sums: the pre-norm sums of mlp_out that belong to e¹ = edges.
        means: of the rows, as mlp_out's backward leaves them for mlp_in's, (T, 2).
        closing: weights whose norm is another.
    """

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
    sums: Tensor
    means: Tensor


def make_inputs(setup: Setup, precision: Precision) -> Inputs:
    """The inputs of a setup, on the CPU. They are the same numbers every time, rounded to the precision."""
    schedule, dim = setup.schedule, setup.dim
    n, rows, count = schedule.nodes, schedule.rows, iter(range(100))
    mixes = sum(len(mix_index(schedule, tile, torch.device("cpu")).view) for tile in schedule.tiles)

    def draw(*shape: int, scale: float = 1.0, at: float = 0.0, low: bool = False) -> Tensor:
        x = at + scale * seeded(*shape, seed=next(count), dtype=torch.float32)
        return x.to(precision.compute if low else precision.accumulate)

    def of_edges(x: Tensor) -> Tensor:
        return x.to(precision.edges or precision.accumulate)

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
    full = of_edges(draw(rows, dim))
    edges = Edges(full, full.to(precision.compute))
    return Inputs(
        nodes=draw(n, dim),
        weights=weights,
        to_node=ToNodeWeights(draw(dim, dim, scale=dim**-0.5, low=True), draw(dim, scale=0.3)),
        head=head,
        head_sums=draw(2, dim, scale=n),
        tokens=(draw(n, dim), draw(n, 1), draw(n, dim)),
        edges=edges,
        upstream=of_edges(draw(rows, dim)),
        node_upstream=draw(n, dim),
        theta=of_edges(torch.sigmoid(draw(rows, dim))),
        kappa=mixing_weights(torch.sigmoid(draw(setup.views, setup.views - 1))),
        logits_upstream=draw(mixes),
        mix_upstream=draw(mixes, dim),
        closing=weights._replace(gamma=draw(dim, scale=0.3, at=1.0), beta=draw(dim, scale=0.3)),
        sums=of_edges(_sums_of(weights, edges)),
        means=draw(rows, 2, scale=0.1),
    )


def _sums_of(w: EdgeWeights, e1: Edges) -> Tensor:
    """s (T, D) in fp64."""
    hidden = F.gelu(F.linear(e1.low.double(), w.w1.double(), w.b1.double()))
    normalized = F.layer_norm(hidden, hidden.shape[1:])
    return normalized @ w.w2.double().T + w.d.double() + e1.full.double()


def mapped(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Apply `function` to every tensor, also inside tuples."""
    if isinstance(x, Tensor):
        return function(x)
    parts = [mapped(function, part) for part in x]
    return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)


class PoisonedWorkspace(Workspace):
    """A workspace whose buffers are new, full of NaN, and followed by values that nothing may overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[str, Tensor]] = []

    def get(self, name: str, rows: int, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        buffer = torch.full((rows * width + _MARGIN,), torch.nan, dtype=dtype or like.dtype, device=like.device)
        buffer[-_MARGIN:] = _CANARY
        self._made.append((name, buffer))
        return buffer[:-_MARGIN].view(rows, width)

    @property
    def names(self) -> set[str]:
        """The names of the buffers that were asked for."""
        return {name for name, _ in self._made}

    def check(self) -> None:
        for name, buffer in self._made:
            assert bool((buffer[-_MARGIN:] == _CANARY).all()), f"{name} was written past its end"


class Run:
    """One implementation of the stages on one setup.

    Args:
        setup: the tiles.
        inputs: what the stages take. They run on the device of the inputs.
        ops: the fused ops; None: the stages are plain torch.
    """

    def __init__(self, setup: Setup, inputs: Inputs, ops: Any = None) -> None:
        self.inputs, self.dim, self.schedule = inputs, setup.dim, setup.schedule
        self.like, self.workspace = inputs.nodes.new_zeros(()), PoisonedWorkspace()
        self.low, self.edges_dtype = inputs.weights.w1.dtype, inputs.edges.full.dtype
        dropout = EdgeDropout(setup.p, 7, torch.tensor(3, device=self.like.device)) if setup.p else None
        fused = (self.workspace, ops) if ops is not None else (None, None)
        self.edge_dtype = inputs.edges.full.dtype
        of_edges = (dropout, 2, *fused, self.edge_dtype)
        self.stages = make_stages(StageContext(self.schedule, self.dim, self.low, self.like, *of_edges))
        tokens = Tokens(*map(self.band, inputs.tokens))
        self.layer = Layer(1, inputs.weights, inputs.closing, tokens)
        u = inputs.nodes.new_zeros(setup.views, setup.views - 1)
        pull = torch.full_like(self.like, 0.625)
        self.mixing = mixing_of(self.stages.context, inputs.nodes, u, pull)._replace(kappa=inputs.kappa)

    def band(self, x: Tensor) -> Band:
        """x (n, W) in the form in which tiles see it."""
        return Band(self.schedule, x)

    def node_sum(self, width: int | None = None) -> NodeSum:
        """A sum at nodes that starts at 0. It is D wide by default."""
        return NodeSum(self.schedule, self.dim if width is None else width, like=self.like)

    def tiles(self) -> Iterator[tuple[int, Tile, Rows]]:
        """Yield the number of each tile, the tile, and a function that copies the tile's rows of a tensor over all
        edges."""
        for number, tile in enumerate(self.schedule.tiles):
            yield number, tile, lambda x, t=tile: x[t.first_row : t.first_row + t.rows].clone()

    def edges(self, rows: Rows) -> Edges:
        full = rows(self.inputs.edges.full)
        return Edges(full, full if self.low is full.dtype else rows(self.inputs.edges.low))

    def edge_room(self, tile: Tile) -> Tensor:
        """Memory (T, D) full of NaN for a tensor over a tile's edges."""
        return self.nan(tile.rows, self.dim, dtype=self.edge_dtype)

    def nan(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory full of NaN that a stage is to write, by default in the accumulating dtype."""
        return torch.full(shape, torch.nan, dtype=dtype or self.like.dtype, device=self.like.device)


class Collected:
    """Results of tiles, side by side."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self._parts.setdefault(name, []).append(tensor.detach().clone())

    def results(self) -> Results:
        return {name: torch.cat(parts) for name, parts in self._parts.items()}
