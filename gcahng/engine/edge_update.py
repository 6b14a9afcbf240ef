"""One edge update on all pairs of n nodes as an operator that autograd and torch.compile know.

gcahng.ops.edge_update calls it. The schedule is that of a batch whose classes have one sample each. The operator works
on one tile of edges at a time, and `edge_memory` says what it saves for the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcahng.engine.differentiable_once import differentiable_once
from gcahng.engine.free_memory import free_memory
from gcahng.engine.masks import EdgeDropout
from gcahng.engine.plan import COMFORTABLE, FULL
from gcahng.engine.precision import DTYPES
from gcahng.engine.prepare import workspace_for
from gcahng.engine.schedule import Band, Schedule, Tile, default_tile_rows, make_schedule
from gcahng.engine.schema import define_operator, differentiate_operator
from gcahng.engine.stages import Stages, make_stages, ops_of
from gcahng.engine.stages.common import Edges, RowMoments, StageContext
from gcahng.engine.stages.edge_update import EdgeRecord, Saving
from gcahng.engine.stages.gate import Layer, LayerSums, Tokens, TokenSums
from gcahng.engine.weights import EdgeGradients, edge_weights

_WEIGHTS = [f"{part}.{kind}" for part in ("norm", "mlp_in", "mlp_norm", "mlp_out") for kind in ("weight", "bias")]
_AT = "layers.0.edge"  # as gcahng.engine.weights names the parameters of a layer


class UpdateTensors(NamedTuple):
    """The tensors of an edge update.

    Attributes:
        edges: (n, n, D), or (n (n + 1) / 2, D) in half-band storage (see gcahng.ops.half_band).
        u: U = k W_q (n, D), with the keys k = K(s) of the tokens s.
        c: k·b_q (n, 1).
        v: values V of the tokens (n, D).
        draw: number of the pass, 0-dim int64. Each pass has dropout masks of its own.
        weights: the tensors that _WEIGHTS names, in that order.
    """

    edges: Tensor
    u: Tensor
    c: Tensor
    v: Tensor
    draw: Tensor
    weights: list[Tensor]


class UpdateSettings(NamedTuple):
    """What an edge update needs beside tensors; plain values, so that torch can trace them.

    Attributes:
        p: chance that dropout drops an attention weight.
        seed: of dropout.
        symmetric: whether e_ij = e_ji, so that half of the pairs are computed.
        compute: dtype of products, by name.
        implementation: that of the stages, as gcahng.dispatch names it.
        edge_memory: store, hidden or recompute.
        record: whether a backward will follow.
    """

    p: float
    seed: int
    symmetric: bool
    compute: str
    implementation: str
    edge_memory: str
    record: bool


class UpdateOutputs(NamedTuple):
    """The updated edges, and what was saved for the backward; a tensor that was not saved is empty.

    Attributes:
        edges: in the form of the edges that entered.
        s: pre-norm sums (rows, D), over the edges of all tiles.
        mean: mean of each edge's 4D hidden channels (rows, 1).
        rstd: their 1/σ (rows, 1).
        h: hidden products (rows, 4D).
    """

    edges: Tensor
    s: Tensor
    mean: Tensor
    rstd: Tensor
    h: Tensor


# -- where a tile's edges lie


class _Edges:
    """All ordered pairs (n, n, D). With a symmetric schedule the mean of both directions enters, and both leave."""

    def __init__(self, schedule: Schedule, x: Tensor) -> None:
        self.schedule, self.x = schedule, x

    def _places(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The nodes i and j (A, O) of a tile's edges."""
        i = torch.arange(tile.first_class, tile.first_class + tile.classes, device=self.x.device)[:, None]
        return torch.broadcast_tensors(i, self.schedule.column_classes(tile, self.x.device))

    def load(self, tile: Tile) -> Tensor:
        """Copies a tile's edges (T, D)."""
        i, j = self._places(tile)
        e = self.x[i, j]
        if self.schedule.symmetric:
            e.add_(self.x[j, i]).mul_(0.5)
        return e.view(tile.rows, -1)

    def store(self, tile: Tile, e: Tensor) -> None:
        """Writes a tile's updated edges e (T, D)."""
        i, j = self._places(tile)
        e = e.view(*i.shape, -1)
        self.x[i, j] = e
        if self.schedule.symmetric:
            self.x[j, i] = e

    def load_gradient(self, tile: Tile) -> Tensor:
        """Copies the gradient (T, D) of a tile's updated edges, both directions of an edge added up."""
        i, j = self._places(tile)
        d = self.x[i, j]
        if tile.mirrored < tile.offsets:
            d[:, tile.mirrored :] += self.x[j, i][:, tile.mirrored :]
        return d.view(tile.rows, -1)

    def store_gradient(self, tile: Tile, d: Tensor) -> None:
        """Writes the gradient d (T, D) of the edges that entered."""
        i, j = self._places(tile)
        d = d.view(*i.shape, -1)
        if tile.mirrored < tile.offsets:  # the mean of both directions entered
            d[:, tile.mirrored :] *= 0.5
            self.x[j, i] = d
        self.x[i, j] = d


class _HalfBand(_Edges):
    """Half-band storage (n (n + 1) / 2, D): one row for both directions of a pair."""

    def _rows(self, tile: Tile) -> Tensor:
        """A view of a tile's rows (A, O, D)."""
        n = self.schedule.classes
        offsets = (n + 1) // 2
        anchors = slice(tile.first_class, tile.first_class + tile.classes)
        if tile.first_offset >= offsets:
            return self.x[n * offsets :][anchors, None]
        band = self.x[: n * offsets].view(n, offsets, -1)
        return band[anchors, tile.first_offset : tile.first_offset + tile.offsets]

    def load(self, tile: Tile) -> Tensor:
        return self._rows(tile).clone(memory_format=torch.contiguous_format).view(tile.rows, -1)

    load_gradient = load

    def store(self, tile: Tile, e: Tensor) -> None:
        rows = self._rows(tile)
        rows.copy_(e.view(rows.shape))

    store_gradient = store


def _edges_of(schedule: Schedule, x: Tensor) -> _Edges:
    """Edges, or their gradient, in whichever storage x has."""
    return _Edges(schedule, x) if x.dim() == 3 else _HalfBand(schedule, x)


# -- forward and backward over the tiles


class _Update:
    """One call of the operator: its schedule, stages and prepared operands."""

    def __init__(self, tensors: UpdateTensors, s: UpdateSettings) -> None:
        edges, compute = tensors.edges, DTYPES[s.compute]
        n, self.dim = tensors.u.shape
        rows = default_tile_rows(self.dim, compute, s.edge_memory, edges.device.type)
        self.schedule = make_schedule(n, 1, symmetric=s.symmetric, tile_rows=rows)
        dropout = EdgeDropout(s.p, s.seed, tensors.draw) if s.p > 0 else None
        like, workspace, ops = tensors.u.detach(), workspace_for(edges.device), ops_of(s.implementation)
        context = StageContext(self.schedule, self.dim, compute, like, dropout, 1, workspace, ops)
        self.stages: Stages = make_stages(context)
        self.named = {f"{_AT}.{name}": x.detach() for name, x in zip(_WEIGHTS, tensors.weights, strict=True)}
        weights = edge_weights(self.named, 0, context)
        tokens = Tokens(*(Band(self.schedule, x.detach()) for x in (tensors.u, tensors.c, tensors.v)))
        self.layer = Layer(0, weights, weights, tokens)
        self.like, self.memory = like, s.edge_memory

    def tiles(self) -> Iterator[tuple[Tile, slice]]:
        """Each tile, and its rows in the tensors that are saved."""
        for tile in self.schedule.tiles:
            yield tile, slice(tile.first_row, tile.first_row + tile.rows)

    def operand(self, full: Tensor) -> Edges:
        """Puts edges (T, D) into the form in which they enter the stages."""
        context = self.stages.context
        if context.same:
            return Edges(full, full)
        return Edges(full, context.scratch("in low", *full.shape).copy_(full))

    def room(self, record: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Memory for what is saved: s, mean, rstd and h of UpdateOutputs."""
        rows = self.schedule.rows if record and self.memory != "recompute" else 0
        hidden = rows if self.memory == "hidden" else 0
        compute = self.stages.context.compute
        return (
            self.like.new_empty(rows, self.dim),
            self.like.new_empty(rows, 1),
            self.like.new_empty(rows, 1),
            self.like.new_empty(hidden, 4 * self.dim, dtype=compute),
        )

    def record(self, tile: Tile, e: Edges, rows: slice, saved: UpdateOutputs) -> EdgeRecord:
        """What the backward of a tile needs, either saved (in these rows) or formed again."""
        update = self.stages.edge_update
        if self.memory == "recompute":
            context = self.stages.context
            moments = RowMoments(*(context.wide(f"row {k} saved", tile.rows, 1) for k in range(2)))
            h, s = context.scratch("h", tile.rows, 4 * self.dim), context.wide("s saved", tile.rows, self.dim)
            out = update.forward(self.layer, tile, e, Saving("e1", h, moments, s), "out")
            return EdgeRecord(e, out.e1, out.gate, h, moments, s)
        e1, gate = update.gate.forward(self.layer, tile, e, "e1")
        h = saved.h[rows] if self.memory == "hidden" else None
        return EdgeRecord(e, e1, gate, h, RowMoments(saved.mean[rows], saved.rstd[rows]), saved.s[rows])


def _forward(tensors: UpdateTensors, s: UpdateSettings) -> UpdateOutputs:
    """Updates the edges, and saves what the settings ask for."""
    call = _Update(tensors, s)
    out = UpdateOutputs(torch.empty_like(tensors.edges), *call.room(s.record))
    entering, leaving = _edges_of(call.schedule, tensors.edges), _edges_of(call.schedule, out.edges)
    for tile, rows in call.tiles():
        e, saving = call.operand(entering.load(tile)), Saving()
        if len(out.s):
            h = out.h[rows] if len(out.h) else None
            saving = Saving(None, h, RowMoments(out.mean[rows], out.rstd[rows]), out.s[rows])
        leaving.store(tile, call.stages.edge_update.forward(call.layer, tile, e, saving, "out").edges.full)
    return out


def _backward(upstream: Tensor, tensors: UpdateTensors, saved: UpdateOutputs, s: UpdateSettings) -> list[Tensor]:
    """The gradients of edges, u, c, v and the weights, in this order."""
    call = _Update(tensors, s)
    d_edges = torch.empty_like(tensors.edges)
    entering, above, below = (_edges_of(call.schedule, x) for x in (tensors.edges, upstream, d_edges))
    sums = LayerSums(EdgeGradients(call.dim, call.like), TokenSums(call.stages.context))
    for tile, rows in call.tiles():
        record = call.record(tile, call.operand(entering.load(tile)), rows, saved)
        d = call.stages.edge_update.backward(call.layer, tile, record, above.load_gradient(tile), sums, True)
        below.store_gradient(tile, d)
    named, tokens = sums.gradients.named(call.named, 0), (total.clone() for total in sums.tokens.totals())
    return [d_edges, *tokens, *(named[f"{_AT}.{name}"].contiguous() for name in _WEIGHTS)]


# -- as operators


def _forward_op(tensors: UpdateTensors, s: UpdateSettings) -> list[Tensor]:
    with torch.autocast(tensors.edges.device.type, enabled=False):
        return list(_forward(tensors, s))


def _forward_fake(tensors: UpdateTensors, s: UpdateSettings) -> list[Tensor]:
    (n, dim), edges = tensors.u.shape, tensors.edges
    rows = (n * (n + 1) // 2 if s.symmetric else n * n) if s.record and s.edge_memory != "recompute" else 0
    like, hidden = tensors.u, rows if s.edge_memory == "hidden" else 0
    room = (like.new_empty(rows, dim), like.new_empty(rows, 1), like.new_empty(rows, 1))
    return [torch.empty_like(edges), *room, like.new_empty(hidden, 4 * dim, dtype=DTYPES[s.compute])]


class _BackwardTensors(NamedTuple):
    """What the backward takes beside the forward's arguments.

    Attributes:
        upstream: gradient of the updated edges, in their form.
        s: see UpdateOutputs, as are the following ones.
        mean: (rows, 1).
        rstd: (rows, 1).
        h: (rows, 4D).
    """

    upstream: Tensor
    s: Tensor
    mean: Tensor
    rstd: Tensor
    h: Tensor


def _backward_op(given: _BackwardTensors, tensors: UpdateTensors, s: UpdateSettings) -> list[Tensor]:
    upstream, *saved = given
    with torch.autocast(upstream.device.type, enabled=False):
        return _backward(upstream.contiguous(), tensors, UpdateOutputs(upstream, *saved), s)


def _backward_fake(_: _BackwardTensors, tensors: UpdateTensors, s: UpdateSettings) -> list[Tensor]:
    return [torch.empty_like(x) for x in (tensors.edges, tensors.u, tensors.c, tensors.v)] + [
        x.new_empty(x.shape) for x in tensors.weights
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)  # which would be zeros, as large as all that is saved
    tensors, ctx.settings = _FORWARD.values(inputs)
    *plain, weights = tensors
    ctx.save_for_backward(*output[1:], *plain, *weights)


def _grad(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    nothing = (None,) * len(UpdateSettings._fields)
    if upstream[0] is None:
        return *(None,) * 5, [None] * len(_WEIGHTS), *nothing
    settings = ctx.settings

    def run(grad: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        *plain, weights = *saved[:9], list(saved[9:])
        return tuple(torch.ops.gcahng.edge_update_backward(grad, *plain, weights, *settings))

    d_edges, du, dc, dv, *weights = differentiable_once("edge_update", run, upstream[0], *ctx.saved_tensors)
    return d_edges, du, dc, dv, None, weights, *nothing


_STRUCTS = (UpdateTensors, UpdateSettings)
_FORWARD = define_operator("edge_update", _STRUCTS, "Tensor[]", _forward_op, _forward_fake)
define_operator("edge_update_backward", (_BackwardTensors, *_STRUCTS), "Tensor[]", _backward_op, _backward_fake)
differentiate_operator("edge_update", _grad, _setup)


def run_edge_update(tensors: UpdateTensors, settings: UpdateSettings) -> Tensor:
    """Calls the operator.

    Returns:
        The updated edges, in the form of the edges that entered.
    """
    return torch.ops.gcahng.edge_update(*tensors, *settings)[0]


def choose_edge_memory(n: int, dim: int, symmetric: bool, edges: Tensor, compute: torch.dtype) -> str:
    """Decides what edge_memory="auto" means for one edge update.

    "hidden" is the fastest, and is taken if what it saves fits into half of the free memory. Otherwise "store" is taken
    if what it saves fits into eight tenths, and else "recompute". Where free memory is not known, it is "store".

    Args:
        n: nodes.
        dim: channels D.
        symmetric: whether half of the pairs are computed.
        edges: any tensor of the edges' dtype on their device.
        compute: dtype of products.

    Returns:
        store, hidden or recompute.
    """
    free = free_memory(edges.device)
    if free is None:
        return "store"
    rows = n * (n + 1) // 2 if symmetric else n * n
    store = rows * dim * edges.dtype.itemsize
    if store + rows * 4 * dim * compute.itemsize <= COMFORTABLE * free:
        return "hidden"
    return "store" if store <= FULL * free else "recompute"
