"""The graph network over a schedule of tiles: sweeps forward and backward. No maths of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.engine import nodes
from gcahng.engine.head import HeadWeights, TorchHead, head_weights
from gcahng.engine.schedule import Band, NodeSum, Schedule, Tile
from gcahng.engine.stages import Edges, Gate, Keep, RowMoments, Tokens, TokenSums, TorchStages
from gcahng.engine.weights import EdgeGradients, edge_weights, to_node_weights


@dataclass
class GraphOptions:
    """heads; compute dtype of products; training: batch statistics; update: running ones follow; momentum and eps of
    both BatchNorms; edge_memory: store | hidden | recompute; edge_dtype: of stored edges."""

    heads: int
    compute: torch.dtype
    training: bool
    update: bool
    momentum: float
    eps: float
    edge_memory: str
    edge_dtype: torch.dtype


@dataclass
class EdgeRecord:
    """One layer of a tile, replayed for its backward: input e, e¹, the gate, the hidden layer (h None: to be
    replayed), and s."""

    e: Edges
    e1: Edges
    gate: Gate
    h: Tensor | None
    moments: RowMoments
    s: Tensor


class GraphPass:
    """One pass of the graph network.

    named: parameters by name; buffers: edge and node BatchNorm (see buffer_list); z (n, D) in canonical order.
    record: a backward will follow.
    """

    def __init__(
        self,
        named: dict[str, Tensor],
        buffers: list[Tensor],
        z: Tensor,
        schedule: Schedule,
        stages: TorchStages,
        head: TorchHead,
        options: GraphOptions,
        record: bool,
    ) -> None:
        self.named, self.buffers, self.z = named, buffers, z
        self.schedule, self.stages, self.head = schedule, stages, head
        self.options, self.record = options, record
        self.layers = sum(name.endswith(".edge.mlp_in.weight") for name in named)
        self.dim = z.shape[1]
        self.edge_weights = [edge_weights(named, layer, options.compute) for layer in range(self.layers)]
        self.to_node = [to_node_weights(named, layer, options.compute) for layer in range(self.layers)]
        mask = nodes.attend_mask(schedule.classes, schedule.views, z.device)
        self.context = nodes.NodeContext(named, options.heads, options.compute, mask, record)
        self.tokens: list[Tokens] = []
        self.attends: list[nodes.Segment] = []
        self.updates: list[nodes.Segment] = []
        self.s: list[Tensor | None] = [None] * self.layers
        self.h: list[Tensor | None] = [None] * self.layers
        self.moments: list[RowMoments | None] = [None] * self.layers
        # What closes each layer: the last one's norm takes on BatchNorm's statistics once they are known.
        self.closing = list(self.edge_weights)
        self.buffer: Tensor | None = None
        self.gradients: dict[str, Tensor] = {}

    @property
    def stored(self) -> bool:
        return self.options.edge_memory != "recompute"

    def rows(self, store: Tensor | None, tile: Tile) -> Tensor | None:
        """A tile's part of a tensor over all edges."""
        return None if store is None else store[tile.first_row : tile.first_row + tile.rows]

    # -- forward

    def forward(self) -> Tensor:
        """Runs all layers; → node features f (n, D). The head's weights are then in self.head_weights, and from here on
        the edges that leave the last layer are normalised."""
        schedule, stages = self.schedule, self.stages
        self.start = nodes.start(self.context, self.z)
        f, x = self.start.outputs
        self.x = Band(schedule, x.detach())
        edge_sum = NodeSum(schedule, self.dim, like=self.z)
        for tile in schedule.tiles:
            stages.edge_to_node(tile, self.to_node[0], stages.edge_start(tile, self.x, "in"), edge_sum)
        moments = self.head.moments(self.dim, self.z)
        for layer in range(self.layers):
            attend = nodes.attention(self.context, layer, f)
            update = nodes.update(self.context, layer, attend.outputs[0], edge_sum.total())
            self.attends.append(attend)
            self.updates.append(update)
            f, u, c, v = (x.detach() for x in update.outputs)
            self.tokens.append(Tokens(Band(schedule, u), Band(schedule, c), Band(schedule, v)))
            last = layer == self.layers - 1
            edge_sum = NodeSum(schedule, self.dim, like=self.z)
            self._open_stores(layer)
            for number, tile in enumerate(schedule.tiles):
                e = self._advance(layer, number, tile, moments if last else None)
                if last and e is not None:
                    self.head.add_moments(tile, e, moments)
                elif not last:
                    stages.edge_to_node(tile, self.to_node[layer + 1], e, edge_sum)
        schedule.complete(moments)
        self.head_weights = self._head_weights(moments)
        self.closing[-1] = self.head_weights.normalised(self.edge_weights[-1])
        return f

    def _open_stores(self, layer: int) -> None:
        rows, z = self.schedule.rows, self.z
        if self.stored:
            self.s[layer] = z.new_empty(rows, self.dim, dtype=self.options.edge_dtype)
            if self.record:
                self.moments[layer] = RowMoments(z.new_empty(rows, 1), z.new_empty(rows, 1))
        if self.options.edge_memory == "hidden" and self.record:
            self.h[layer] = z.new_empty(rows, 4 * self.dim, dtype=self.options.compute)

    def _kept_moments(self, layer: int, tile: Tile) -> RowMoments | None:
        kept = self.moments[layer]
        return None if kept is None else RowMoments(self.rows(kept.mean, tile), self.rows(kept.rstd, tile))

    def _advance(self, layer: int, number: int, tile: Tile, sums: Tensor | None = None) -> Edges | None:
        """A layer's edge update on a tile → the edges that leave it, stored as options say; sums: see stages.update."""
        e = self.edge(layer, number, tile)
        h, s = (self.rows(x[layer], tile) for x in (self.h, self.s))
        keep = Keep(None, h, self._kept_moments(layer, tile), s)
        weights = (self.edge_weights[layer], self.closing[layer], self.tokens[layer])
        return self.stages.update(layer, number, tile, *weights, e, keep, "out", sums).edges

    def edge(self, layer: int, number: int, tile: Tile, slot: str = "in") -> Edges:
        """The edges that enter a layer; layer L: those that leave the last, normalised."""
        if layer == 0:
            return self.stages.edge_start(tile, self.x, slot)
        s = self.rows(self.s[layer - 1], tile)
        if s is not None:
            return self.stages.norm_gelu(self.closing[layer - 1], s.to(self.z.dtype), slot)
        return self._advance(layer - 1, number, tile)

    def coefficients(self, e: Edges) -> Tensor:
        """θ (T, D) of the edges that leave the last layer."""
        return self.head.head(self.head_weights, e)

    def _head_weights(self, moments: Tensor) -> HeadWeights:
        o = self.options
        edges = self.schedule.nodes**2
        given = moments / edges if o.training else None
        return head_weights(self.named, self.buffers[:4], given, edges, o.compute, o.momentum, o.eps, o.update)

    def node_head(self, f: Tensor) -> nodes.Segment:
        """f (n, D) → the node classifier's logits."""
        return nodes.head(self.context, f, self._node_norm())

    def node_statistics(self, f: Tensor) -> None:
        """Moves the node BatchNorm's running statistics, where nothing asks for its output."""
        self._node_norm()(f, self.named["node_batch_norm.weight"])

    def _node_norm(self) -> nodes.NodeNorm:
        o = self.options
        mean, variance, count, bias = self.buffers[4:]
        if o.training and not o.update:
            mean = variance = count = None
        return nodes.NodeNorm(mean, variance, count, bias, o.training, o.momentum, o.eps)

    # -- backward

    def backward(
        self,
        df: Tensor | None,
        top: int,
        top_gradient: Callable[[Tile, Edges], Tensor] | None,
        want_z: bool,
    ) -> Tensor | None:
        """df: gradient of the node features that left the last layer (or None); top: the last layer whose edge update
        has a gradient (L-1, or L-2 where θ is held fixed); top_gradient(tile, e): gradient (T, D) of the edges e that
        leave layer L-1, asked for where top = L-1. → dz if wanted; parameters' gradients in self.gradients.
        """
        self._top, self._top_gradient = top, top_gradient
        self._edge_sum_gradients: list[Band | None] = [None] * self.layers
        for layer in reversed(range(self.layers)):
            tokens: list[Tensor | None] = [None, None, None]
            if layer <= top:
                tokens = self._backward_sweep(layer, want_edges=layer > 0 or want_z)
            df1, d_sum = self.updates[layer].backward([df, *tokens], self.gradients)
            self._edge_sum_gradients[layer] = Band(self.schedule, d_sum)
            (df,) = self.attends[layer].backward([df1], self.gradients)
        dx = self._start_sweep(want_z)
        self._top_gradient = None  # it holds this pass: a cycle would keep all edges until the collector comes
        (dz,) = self.start.backward([df, dx], self.gradients)
        return dz if want_z else None

    def _backward_sweep(self, layer: int, want_edges: bool) -> list[Tensor]:
        gradients = EdgeGradients(self.dim, self.z)
        sums = TokenSums(self.schedule, self.dim, self.z)
        to_node = self._to_node_gradients()
        for number, tile in enumerate(self.schedule.tiles):
            d, record = self._gradient_above(layer, number, tile, to_node)
            d = self._layer_backward(layer, number, tile, d, record, (gradients, sums), want_edges)
            if want_edges and self.stored:
                self.rows(self.gradient_buffer(), tile).copy_(d)
        self.schedule.complete(*gradients.parts())
        self.gradients |= gradients.named(self.named, layer)
        if layer + 1 < self.layers:
            self._keep_to_node(layer + 1, to_node)
        return [sums.u.total(), sums.c.total(), sums.v.total()]

    def _gradient_above(
        self, layer: int, number: int, tile: Tile, to_node: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, EdgeRecord]:
        """The gradient (T, D) of the edges that leave a layer, through everything above it, and the layer's record.

        Stored: what the sweep above left, and the sum over edges of the layer above. Recomputed: from the top down.
        """
        return (
            self._stored_above(layer, number, tile, to_node)
            if self.stored
            else self._recomputed_above(layer, number, tile, to_node)
        )

    def _stored_above(
        self, layer: int, number: int, tile: Tile, to_node: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, EdgeRecord]:
        above = layer + 1
        e = self.edge(above, number, tile, "out")
        if layer < self._top:
            d = self._taken(tile)
        elif above == self.layers:
            d = self._top_gradient(tile, e)
        else:
            d = torch.zeros_like(e.full)
        if above < self.layers:
            band = self._edge_sum_gradients[above]
            self.stages.edge_to_node_backward(tile, self.to_node[above], e, band, to_node, d)
        return d, self._stored_record(layer, number, tile)

    def _stored_record(self, layer: int, number: int, tile: Tile) -> EdgeRecord:
        e = self.edge(layer, number, tile)
        e1, gate = self.stages.gate(layer, number, tile, self.edge_weights[layer], self.tokens[layer], e, "e1")
        s = self.rows(self.s[layer], tile).to(self.z.dtype)
        return EdgeRecord(e, e1, gate, self.rows(self.h[layer], tile), self._kept_moments(layer, tile), s)

    def _recomputed_above(
        self, layer: int, number: int, tile: Tile, to_node: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, EdgeRecord]:
        records, e = self._replay(number, tile)
        d = self._top_gradient(tile, e) if self._top == self.layers - 1 else torch.zeros_like(e.full)
        for above in reversed(range(layer, self._top + 1)):
            if above + 1 < self.layers:
                out = records[above + 1].e if above < self._top else e
                into = to_node if above == layer else None
                band = self._edge_sum_gradients[above + 1]
                self.stages.edge_to_node_backward(tile, self.to_node[above + 1], out, band, into, d)
            if above > layer:
                d = self._layer_backward(above, number, tile, d, records[above], None, True)
        return d, records[layer]

    def _replay(self, number: int, tile: Tile) -> tuple[list[EdgeRecord], Edges]:
        """Layers 0 … top of a tile, with all their backward needs → records, and the edges that leave the top."""
        records, stages = [], self.stages
        e = stages.edge_start(tile, self.x, "edges 0")
        for layer in range(self._top + 1):
            h = stages.scratch(f"h {layer}", tile.rows, 4 * self.dim)
            s = stages.scratch(f"s {layer}", tile.rows, self.dim, wide=True)
            moments = RowMoments(*(stages.scratch(f"row {k} {layer}", tile.rows, 1, wide=True) for k in range(2)))
            keep = Keep(f"e1 {layer}", h, moments, s)
            weights = (self.edge_weights[layer], self.closing[layer], self.tokens[layer])
            update = stages.update(layer, number, tile, *weights, e, keep, f"edges {layer + 1}")
            records.append(EdgeRecord(e, update.e1, update.gate, h, moments, s))
            e = update.edges
        return records, e

    def _layer_backward(
        self,
        layer: int,
        number: int,
        tile: Tile,
        d: Tensor,
        record: EdgeRecord,
        into: tuple[EdgeGradients, TokenSums] | None,
        want_edges: bool,
    ) -> Tensor | None:
        """Gradient of the edges that leave a layer → of those that enter it."""
        w, r = self.edge_weights[layer], record
        de1 = self.stages.mlp_backward(w, r.e1, r.s, d, r.h, r.moments, into and into[0])
        return self.stages.gate_backward(layer, number, tile, w, self.tokens[layer], r.e, r.gate, de1, into, want_edges)

    def _start_sweep(self, want_z: bool) -> Tensor | None:
        """The first sum over edges and, if wanted, the edges' start: → dx̂ (n, D)."""
        to_node = self._to_node_gradients()
        dx = NodeSum(self.schedule, self.dim, like=self.z) if want_z else None
        band = self._edge_sum_gradients[0]
        for number, tile in enumerate(self.schedule.tiles):
            d = self._start_gradient(number, tile) if want_z else None
            e = self.stages.edge_start(tile, self.x, "in")
            self.stages.edge_to_node_backward(tile, self.to_node[0], e, band, to_node, d)
            if want_z:
                self.stages.edge_start_backward(tile, self.x, d, dx)
        self._keep_to_node(0, to_node)
        return dx.total() if want_z else None

    def _start_gradient(self, number: int, tile: Tile) -> Tensor:
        """The gradient of e⁰ through the first edge update."""
        if self._top < 0:
            return self.z.new_zeros(tile.rows, self.dim)
        if self.stored:
            return self._taken(tile)
        d, record = self._recomputed_above(0, number, tile, None)
        return self._layer_backward(0, number, tile, d, record, None, True)

    # -- parts

    def gradient_buffer(self) -> Tensor:
        """Where the gradient of all edges lies between two sweeps (all rows, D)."""
        if self.buffer is None:
            self.buffer = self.z.new_empty(self.schedule.rows, self.dim, dtype=self.options.edge_dtype)
        return self.buffer

    def _taken(self, tile: Tile) -> Tensor:
        """What the sweep above left for a tile; may be overwritten."""
        return self.rows(self.gradient_buffer(), tile).to(self.z.dtype)

    def _to_node_gradients(self) -> tuple[Tensor, Tensor]:
        return self.z.new_zeros(self.dim, self.dim), self.z.new_zeros(self.dim)

    def _keep_to_node(self, layer: int, found: tuple[Tensor, Tensor]) -> None:
        self.schedule.complete(*found)
        at = f"layers.{layer}.node.edge_to_node"
        self.gradients[f"{at}.weight"], self.gradients[f"{at}.bias"] = found
