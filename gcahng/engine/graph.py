"""The graph network over a schedule of tiles: sweeps forward and backward.

It has no mathematics of its own: that is in gcahng.engine.stages (edges) and gcahng.engine.nodes (nodes).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gcahng.engine.graph_options import GraphOptions
from gcahng.engine.node_layer import Attention, Update
from gcahng.engine.nodes import Head, NodeContext, NodeNorm, NormSums, Start, attend_mask
from gcahng.engine.schedule import Band, ByTile, Schedule, Tile, bands_of
from gcahng.engine.shared_attention import queries_of
from gcahng.engine.stages import Stages
from gcahng.engine.stages.common import Edges, RowMoments
from gcahng.engine.stages.edge_update import EdgeRecord, Saving
from gcahng.engine.stages.gate import Layer, LayerSums, Tokens, TokenSums
from gcahng.engine.stages.head import EdgeNorm, HeadWeights, head_weights
from gcahng.engine.under_way import UnderWay
from gcahng.engine.weights import EdgeGradients, LowWeights, ToNodeSums, edge_weights, to_node_weights


def _moments_of_tiles(schedule: Schedule, like: Tensor, layers: int) -> list[dict[int, RowMoments]]:
    """Memory for the row moments of each tile's edges, for each layer by the tiles' first rows."""
    memory, fields = like.new_empty(layers * schedule.rows * len(RowMoments._fields), 1), RowMoments._fields
    parts = iter(memory.split([tile.rows for tile in schedule.tiles for _ in fields] * layers))
    return [
        {tile.first_row: RowMoments(*(next(parts) for _ in fields)) for tile in schedule.tiles} for _ in range(layers)
    ]


class GraphPass:
    """One pass of the graph network: `forward` first, then, if it was recorded, `backward`.

    Args:
        named: parameters by name.
        buffers: statistics of edge and node BatchNorm (see buffer_list), which are changed in place.
        z: embeddings (n, D) in canonical order.
        stages: the stages of an implementation, over a schedule of tiles.
        options: how the pass runs.
        record: whether a backward will follow.

    Attributes:
        s: for each layer the pre-norm sums (rows, D) of all edges by tile, or None where they are not stored.
        h: for each layer the hidden products (rows, 4D) of all edges by tile, or None.
        moments: for each layer the row moments of the hidden channels by the tiles' first rows, or None.
        head_weights: the coefficient head, prepared at the end of `forward`.
        gradients: the parameters' gradients by name, which `backward` fills in.
    """

    def __init__(
        self,
        named: dict[str, Tensor],
        buffers: list[Tensor],
        z: Tensor,
        stages: Stages,
        options: GraphOptions,
        record: bool,
    ) -> None:
        self.named, self.buffers, self.z = named, buffers, z
        self.schedule, self.stages = stages.context.schedule, stages
        self.options, self.record = options, record
        self.layers = sum(name.endswith(".edge.mlp_in.weight") for name in named)
        self.dim = z.shape[1]
        context = stages.context
        self.low = LowWeights(named, self.layers, context)
        self.edge_weights = [edge_weights(named, layer, context, self.low) for layer in range(self.layers)]
        self.to_node = [to_node_weights(named, layer, self.low) for layer in range(self.layers)]
        own = queries_of(context)
        self.context = NodeContext(named, self.low, options.heads, attend_mask(context, own), own, record, stages)
        self.tokens: list[Tokens] = []
        self.attends: list[Attention] = []
        self.updates: list[Update] = []
        self.s: list[ByTile | None] = [None] * self.layers
        self.h: list[ByTile | None] = [None] * self.layers
        self.moments: list[dict[int, RowMoments] | None] = [None] * self.layers
        # What closes each layer: the last one's norm takes on BatchNorm's statistics once they are known.
        self.closing = list(self.edge_weights)
        self.buffer: ByTile | None = None
        self.gradients: dict[str, Tensor] = {}

    @property
    def stored(self) -> bool:
        """Whether the edges that leave a layer are stored."""
        return self.options.edge_memory != "recompute"

    def full(self, x: Tensor) -> Tensor:
        """What was stored of edges, in the dtype that stages take; x itself if it has that dtype already."""
        dtype = self.stages.context.edges_dtype
        return x if x.dtype is dtype else x.to(dtype)

    # -- forward

    def forward(self) -> Tensor:
        """Runs all layers.

        Afterwards the head's weights are in self.head_weights, and the edges that leave the last layer are normalized.

        Returns:
            Node features f (n, D).
        """
        schedule, stages, context = self.schedule, self.stages, self.stages.context
        self.start = Start(self.context, self.z)
        f, self.x = self.start.f, self.start.x
        edge_sums = context.node_sums({f"edge sum {layer}": self.dim for layer in range(self.layers)})
        if self.stored and self.record:
            self.moments = [*_moments_of_tiles(schedule, self.z, self.layers)]
        for tile in schedule.tiles:
            stages.edge_to_node.forward(
                tile, self.to_node[0], stages.edge_start.forward(tile, self.x, "in"), edge_sums[0]
            )
        moments = stages.head.moments()
        for layer in range(self.layers):
            attend = Attention(self.context, layer, f)
            update = Update(self.context, layer, attend.f1, edge_sums[layer].total())
            self.attends.append(attend)
            self.updates.append(update)
            f = update.f
            self.tokens.append(Tokens(*update.tokens))
            last = layer == self.layers - 1
            self._open_stores(layer)
            for tile in schedule.tiles:
                saving = self._saving(layer, tile)
                sums = moments if last else None
                entering = self.edge(layer, tile)
                e = stages.edge_update.forward(self._layer(layer), tile, entering, saving, "out", sums).edges
                if last and e is not None:
                    stages.head.add_moments(tile, e, moments)
                elif not last:
                    stages.edge_to_node.forward(tile, self.to_node[layer + 1], e, edge_sums[layer + 1])
        schedule.complete(moments)
        self.head_weights = self._head_weights(moments)
        self.closing[-1] = self.head_weights.normalized(self.edge_weights[-1])
        return f.full

    def _open_stores(self, layer: int) -> None:
        """Makes room for what is stored of a layer's edges."""
        rows, z = self.schedule.rows, self.z
        if self.stored:
            self.s[layer] = ByTile(self.schedule, z.new_empty(rows, self.dim, dtype=self.options.edge_dtype))
        if self.options.edge_memory == "hidden" and self.record:
            self.h[layer] = ByTile(self.schedule, z.new_empty(rows, 4 * self.dim, dtype=self.options.compute))

    def _saved_moments(self, layer: int, tile: Tile) -> RowMoments | None:
        """A tile's part of a layer's row moments."""
        saved = self.moments[layer]
        return None if saved is None else saved[tile.first_row]

    def _layer(self, layer: int) -> Layer:
        """What a layer's edge update works with."""
        return Layer(layer, self.edge_weights[layer], self.closing[layer], self.tokens[layer])

    def _saving(self, layer: int, tile: Tile) -> Saving:
        """Where a layer's edge update stores what the options ask for."""
        h, s = (None if x[layer] is None else x[layer][tile] for x in (self.h, self.s))
        return Saving(None, h, self._saved_moments(layer, tile), s)

    def edge(self, layer: int, tile: Tile, slot: str = "in") -> Edges:
        """The edges that enter a layer, or, for layer = L, the normalized edges that leave the last one.

        Args:
            layer: the layer's number, 0 … L.
            tile: where the edges lie.
            slot: a name for the memory of the result (see StageContext.scratch).
        """
        if layer == 0:
            return self.stages.edge_start.forward(tile, self.x, slot)
        s = self.s[layer - 1]
        if s is not None:
            return self.stages.norm_gelu.forward(self.closing[layer - 1].norm, self.full(s[tile]), slot)
        below, entering = layer - 1, self.edge(layer - 1, tile)
        update = self.stages.edge_update
        return update.forward(self._layer(below), tile, entering, self._saving(below, tile), "out").edges

    def coefficients(self, e: Edges) -> Tensor:
        """θ (T, D) of the edges that leave the last layer."""
        return self.stages.head.forward(self.head_weights, e)

    def last_coefficients(self, tile: Tile) -> Tensor:
        """θ (T, D) of a tile. Where edges are stored, it takes the place of those that leave the last layer."""
        e, s = self.edge(self.layers, tile), self.s[-1]
        if s is None:
            return self.coefficients(e)
        if s.x.dtype is self.stages.context.edges_dtype:
            return self.stages.head.forward(self.head_weights, e, s[tile])
        theta = self.coefficients(e)
        s[tile].copy_(theta)
        return theta

    def _head_weights(self, moments: Tensor) -> HeadWeights:
        """Prepares the head, from the moments (2, D) of all edges."""
        o = self.options
        edges = self.schedule.nodes**2
        batch_moments = moments / edges if o.training else None
        norm = EdgeNorm(*self.buffers[:4], o.momentum, o.eps, o.update)
        return head_weights(self.named, norm, batch_moments, edges, self.stages.context, self.low)

    def node_head(self, f: Tensor) -> Head:
        """The node classifier's logits (n, M) of node features f (n, D)."""
        return Head(self.context, f, self._node_norm())

    def node_statistics(self, f: Tensor) -> None:
        """Updates the node BatchNorm's running statistics where nothing needs its output."""
        self._node_norm()(f, self.named["node_batch_norm.weight"])

    def _node_norm(self) -> NodeNorm:
        o = self.options
        mean, variance, count, bias = self.buffers[4:]
        if o.training and not o.update:
            mean = variance = count = None
        return NodeNorm(mean, variance, count, bias, o.training, o.momentum, o.eps)

    # -- backward

    def backward(
        self,
        df: Tensor | None,
        top: int,
        top_gradient: Callable[[Tile, Edges], Tensor] | None,
        want_z: bool,
    ) -> Tensor | None:
        """Runs the backward of all layers, and leaves the parameters' gradients in self.gradients.

        Args:
            df: gradient of the node features (n, D) that left the last layer, or None.
            top: the last layer whose edge update has a gradient (L - 1, or L - 2 where θ is held fixed).
            top_gradient: top_gradient(tile, e) is the gradient (T, D) of the edges e that leave layer L - 1. It is
                called only if top = L - 1.
            want_z: whether dz is wanted.

        Returns:
            dz (n, D) if it is wanted, else None.
        """
        self._top, self._top_gradient = top, top_gradient
        self._edge_sum_gradients: list[Band | None] = [None] * self.layers
        self._under_way = UnderWay(self.schedule, self.gradients)
        sums = self.context.sums = NormSums(self.layers, self.z)
        for layer in reversed(range(self.layers)):
            tokens = self._backward_sweep(layer, want_edges=layer > 0 or want_z) if layer <= top else None
            d_sum = self.stages.context.wrapped(f"d edge sum {layer}", self.dim)
            df1 = self.updates[layer].backward(df, tokens, d_sum.head, self.gradients)
            (self._edge_sum_gradients[layer],) = bands_of(self.schedule, d_sum)
            df = self.attends[layer].backward(df1, self.gradients)
        sums.file(self.gradients)
        dx = self._start_sweep(want_z)
        self._top_gradient = None  # it holds this pass: a cycle would keep all edges until the collector comes
        dz = self.start.backward(df, dx, want_z, self.gradients)
        self._under_way.finish()
        return dz

    def _backward_sweep(self, layer: int, want_edges: bool) -> list[Tensor]:
        """Runs the backward of a layer's edge update over all tiles, and returns dU, dc and dV of its tokens."""
        sums = LayerSums(EdgeGradients(self.dim, self.z), TokenSums(self.stages.context))
        to_node = self._to_node_sums()
        for tile in self.schedule.tiles:
            d, record = self._gradient_above(layer, tile, to_node)
            d = self._layer_backward(layer, tile, d, record, sums, want_edges)
            if want_edges:
                self.leave_gradient(tile, d)
        tokens, edges = sums.tokens.totals(), sums.gradients
        self._under_way.finish()  # those of the sweep before
        self._under_way.add(edges.parts(), lambda: edges.named(self.named, layer))
        if layer + 1 < self.layers:
            self._finish_to_node(layer + 1, to_node)
        return tokens

    def _gradient_above(self, layer: int, tile: Tile, to_node: ToNodeSums | None) -> tuple[Tensor, EdgeRecord]:
        """The gradient (T, D) of the edges that leave a layer, through everything above it, and the layer's record.

        Where edges are stored, it is what the sweep above left, and the part of the node sum of the layer above.
        Otherwise it is recomputed from the top layer down.
        """
        above = self._stored_above if self.stored else self._recomputed_above
        return above(layer, tile, to_node)

    def _stored_above(self, layer: int, tile: Tile, to_node: ToNodeSums | None) -> tuple[Tensor, EdgeRecord]:
        above = layer + 1
        e = self.edge(above, tile, "out")
        add = layer < self._top
        if add:
            d = self.gradient_of(tile)
        elif above == self.layers:
            d = self._top_gradient(tile, e)
        else:
            d = self._new_gradient(tile)
        if above < self.layers:
            band = self._edge_sum_gradients[above]
            self.stages.edge_to_node.backward(tile, self.to_node[above], e, band, to_node, d, add)
        return d, self._stored_record(layer, tile)

    def _stored_record(self, layer: int, tile: Tile) -> EdgeRecord:
        """What a layer's backward needs, from what the forward stored."""
        e = self.edge(layer, tile)
        e1, gate = self.stages.edge_update.gate.forward(self._layer(layer), tile, e, "e1")
        h = None if self.h[layer] is None else self.h[layer][tile]
        return EdgeRecord(e, e1, gate, h, self._saved_moments(layer, tile), self.full(self.s[layer][tile]))

    def _recomputed_above(self, layer: int, tile: Tile, to_node: ToNodeSums | None) -> tuple[Tensor, EdgeRecord]:
        records, e = self._replay(tile)
        add = self._top == self.layers - 1
        d = self._top_gradient(tile, e) if add else self._new_gradient(tile)
        for above in reversed(range(layer, self._top + 1)):
            if above + 1 < self.layers:
                out = records[above + 1].e if above < self._top else e
                into = to_node if above == layer else None
                band = self._edge_sum_gradients[above + 1]
                self.stages.edge_to_node.backward(tile, self.to_node[above + 1], out, band, into, d, add)
                add = True
            if above > layer:
                d = self._layer_backward(above, tile, d, records[above], None, True)
        return d, records[layer]

    def _replay(self, tile: Tile) -> tuple[list[EdgeRecord], Edges]:
        """Runs the layers 0 … top again on a tile.

        Returns:
            What each layer's backward needs, and the edges that leave the top layer.
        """
        records, context = [], self.stages.context
        e = self.stages.edge_start.forward(tile, self.x, "edges 0")
        for layer in range(self._top + 1):
            h = context.scratch(f"h {layer}", tile.rows, 4 * self.dim)
            s = context.edge_scratch(f"s {layer}", tile.rows)
            moments = RowMoments(*(context.wide(f"row {k} {layer}", tile.rows, 1) for k in range(2)))
            saving = Saving(f"e1 {layer}", h, moments, s)
            update = self.stages.edge_update.forward(self._layer(layer), tile, e, saving, f"edges {layer + 1}")
            records.append(EdgeRecord(e, update.e1, update.gate, h, moments, s))
            e = update.edges
        return records, e

    def _layer_backward(
        self, layer: int, tile: Tile, d: Tensor, record: EdgeRecord, into: LayerSums | None, want_edges: bool
    ) -> Tensor | None:
        """The gradient of the edges that enter a layer, from that of the edges that leave it."""
        return self.stages.edge_update.backward(self._layer(layer), tile, record, d, into, want_edges)

    def _start_sweep(self, want_z: bool) -> Tensor | None:
        """Runs the backward of the first node sum and, if dz is wanted, of the edge start. Returns dx̂ (n, D)."""
        to_node = self._to_node_sums()
        dx = self.stages.context.node_sums({"dx": self.dim})[0] if want_z else None
        band = self._edge_sum_gradients[0]
        for tile in self.schedule.tiles:
            d = self._start_gradient(tile) if want_z else None
            e = self.stages.edge_start.forward(tile, self.x, "in")
            self.stages.edge_to_node.backward(tile, self.to_node[0], e, band, to_node, d, add=self._top >= 0)
            if want_z:
                self.stages.edge_start.backward(tile, self.x, d, dx)
        dx = dx.total() if want_z else None
        self._finish_to_node(0, to_node)
        return dx

    def _start_gradient(self, tile: Tile) -> Tensor:
        """The gradient of e⁰ through the first edge update; memory for a gradient if there is none."""
        if self._top < 0:
            return self._new_gradient(tile)
        if self.stored:
            return self.gradient_of(tile)
        return self._layer_backward(0, tile, *self._recomputed_above(0, tile, None), None, True)

    # -- parts

    def _gradient_buffer(self) -> ByTile:
        """Memory (rows, D) for the gradient of all edges between two sweeps, by tile."""
        if self.buffer is None:
            shape = (self.schedule.rows, self.dim)
            self.buffer = ByTile(self.schedule, self.z.new_empty(shape, dtype=self.options.edge_dtype))
        return self.buffer

    def gradient_room(self, tile: Tile) -> Tensor | None:
        """Where a tile's gradient (T, D) will be left for the next sweep; None if it is not left there as it is."""
        if not self.stored or self.options.edge_dtype is not self.stages.context.edges_dtype:
            return None
        return self._gradient_buffer()[tile]

    def _new_gradient(self, tile: Tile) -> Tensor:
        """Memory (T, D) for a gradient; the contents are undefined."""
        room = self.gradient_room(tile)
        return self.stages.context.edge_scratch("new gradient", tile.rows) if room is None else room

    def leave_gradient(self, tile: Tile, d: Tensor) -> None:
        """Leaves a tile's gradient (T, D) for the next sweep, where edges are stored."""
        if self.stored and d is not self.gradient_room(tile):
            self._gradient_buffer()[tile].copy_(d)

    def gradient_of(self, tile: Tile) -> Tensor:
        """The gradient (T, D) that the sweep above left for a tile. The caller may overwrite it."""
        return self.full(self._gradient_buffer()[tile])

    def _to_node_sums(self) -> ToNodeSums:
        """Zeros, to which a sweep adds."""
        return ToNodeSums(self.z.new_zeros(self.dim, self.dim), self.z.new_zeros(self.dim))

    def _finish_to_node(self, layer: int, sums: ToNodeSums) -> None:
        """Files the gradients that a sweep has added up, once they are complete."""
        at = f"layers.{layer}.node.edge_to_node"
        self._under_way.add(sums, lambda: {f"{at}.weight": sums.weight, f"{at}.bias": sums.bias})
