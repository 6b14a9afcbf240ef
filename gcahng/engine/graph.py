"""The graph network over a schedule of tiles: sweeps forward and backward. No maths of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.engine import nodes
from gcahng.engine.head import HeadWeights, Moments, head_weights
from gcahng.engine.masks import EdgeDropout, MaskSource
from gcahng.engine.schedule import Band, NodeSum, Schedule, Tile
from gcahng.engine.stages import Gate, Tokens, TokenSums, TorchStages
from gcahng.engine.weights import EdgeGradients, edge_weights, to_node_weights


@dataclass
class EdgeRecord:
    """One layer of a tile, replayed for its backward: input e, gate, e¹, hidden pre-activation (or None), pre-norm sum s."""

    e: Tensor
    keep: Tensor | None
    e1: Tensor
    gate: Gate
    h: Tensor | None
    s: Tensor


@dataclass
class GraphOptions:
    """heads; compute dtype of products; training: batch statistics; update: running ones follow; momentum and eps of both
    BatchNorms; edge_memory: store | hidden | recompute; edge_dtype: of stored edges."""

    heads: int
    compute: torch.dtype
    training: bool
    update: bool
    momentum: float
    eps: float
    edge_memory: str
    edge_dtype: torch.dtype


class GraphPass:
    """One pass of the graph network.

    named: parameters by name; buffers: edge and node BatchNorm (see buffer_list); z (n, D) in canonical order. record: a
    backward will follow.
    """

    def __init__(
        self,
        named: dict[str, Tensor],
        buffers: list[Tensor],
        z: Tensor,
        schedule: Schedule,
        stages: TorchStages,
        dropout: EdgeDropout | None,
        options: GraphOptions,
        record: bool,
    ) -> None:
        self.named, self.buffers, self.z = named, buffers, z
        self.schedule, self.stages, self.options, self.record = schedule, stages, options, record
        self.layers = sum(name.endswith(".edge.mlp_in.weight") for name in named)
        self.dim = z.shape[1]
        compute = options.compute
        self.edge_weights = [edge_weights(named, layer, compute) for layer in range(self.layers)]
        self.to_node = [to_node_weights(named, layer, compute) for layer in range(self.layers)]
        mask = nodes.attend_mask(schedule.classes, schedule.views, z.device)
        self.context = nodes.NodeContext(named, options.heads, compute, mask, record)
        self.masks = [MaskSource(schedule, layer, dropout, z.dtype) if dropout else None for layer in range(self.layers)]
        self.tokens: list[Tokens] = []
        self.attends: list[nodes.Segment] = []
        self.updates: list[nodes.Segment] = []
        self.s: list[Tensor | None] = [None] * self.layers
        self.h: list[Tensor | None] = [None] * self.layers
        self.buffer: Tensor | None = None
        self.gradients: dict[str, Tensor] = {}

    # -- forward

    def forward(self) -> Tensor:
        """Runs all layers; → node features f (n, D). self.moments then hold the edges' sums."""
        schedule, stages = self.schedule, self.stages
        self.start = nodes.start(self.context, self.z)
        f, x = self.start.outputs
        self.x = Band(schedule, x.detach())
        edge_sum = NodeSum(schedule, self.dim, like=self.z)
        for tile in schedule.tiles:
            stages.edge_to_node(tile, self.to_node[0], stages.edge_start(tile, self.x), edge_sum)
        self.moments = Moments(schedule, self.dim, self.z.device)
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
                e = self._advance(layer, number, tile)
                if last:
                    self.moments.add(tile, e)
                else:
                    stages.edge_to_node(tile, self.to_node[layer + 1], e, edge_sum)
        return f

    def _open_stores(self, layer: int) -> None:
        memory, rows = self.options.edge_memory, self.schedule.rows
        if memory != "recompute":
            self.s[layer] = self.z.new_empty(rows, self.dim, dtype=self.options.edge_dtype)
        if memory == "hidden" and self.record:
            self.h[layer] = self.z.new_empty(rows, 4 * self.dim, dtype=self.options.compute)

    def _advance(self, layer: int, number: int, tile: Tile) -> Tensor:
        """A layer's edge update on a tile → e of the next layer (T, D), stored as options say."""
        w = self.edge_weights[layer]
        e = self.edge(layer, number, tile)
        e1, _ = self.stages.gate(tile, w, self.tokens[layer], e, self._keep(layer, number))
        g, mean, rstd = self.stages.hidden(w, e1, self._rows(self.h[layer], tile))
        s = self.stages.close(w, e1, g, mean, rstd)
        if self.s[layer] is not None:
            self._rows(self.s[layer], tile).copy_(s)
        return self.stages.norm_gelu(w, s)

    def edge(self, layer: int, number: int, tile: Tile) -> Tensor:
        """The edges that enter a layer (T, D); layer L: those that leave the last."""
        if layer == 0:
            return self.stages.edge_start(tile, self.x)
        s = self._rows(self.s[layer - 1], tile)
        if s is not None:
            return self.stages.norm_gelu(self.edge_weights[layer - 1], s.to(self.z.dtype))
        return self._advance(layer - 1, number, tile)

    def head_weights(self) -> HeadWeights:
        """The coefficient head, after forward: with the batch's statistics in training."""
        o = self.options
        moments = self.moments if o.training else None
        edges = self.schedule.nodes**2
        return head_weights(self.named, self.buffers[:4], moments, edges, o.compute, o.momentum, o.eps, o.update)

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
        top_gradient: Callable[[int, Tile, Tensor | None], Tensor] | None,
        want_z: bool,
    ) -> Tensor | None:
        """df: gradient of the node features that left the last layer (or None); top: the last layer whose edge update has
        a gradient (L-1, or L-2 where θ is held fixed); top_gradient(number, tile, e): gradient (T, D) of the edges that leave
        layer L-1, asked for where top = L-1 (e: these edges if at hand). → dz if wanted; parameters' gradients in self.gradients.
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
        (dz,) = self.start.backward([df, dx], self.gradients)
        return dz if want_z else None

    def _backward_sweep(self, layer: int, want_edges: bool) -> list[Tensor]:
        gradients = EdgeGradients(self.dim, self.z)
        sums = TokenSums(self.schedule, self.dim, self.z)
        to_node = self._to_node_gradients()
        for number, tile in enumerate(self.schedule.tiles):
            d, records = self._gradient_above(layer, number, tile, to_node)
            d = self._layer_backward(layer, number, tile, d, records, (gradients, sums), want_edges)
            if want_edges and self.options.edge_memory != "recompute":
                self._rows(self._gradient_buffer(), tile).copy_(d)
        self.gradients |= gradients.named(self.named, layer)
        if layer + 1 < self.layers:
            self._keep_to_node(layer + 1, to_node)
        return [sums.u.total(), sums.c.total(), sums.v.total()]

    def _gradient_above(
        self, layer: int, number: int, tile: Tile, to_node: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, list[EdgeRecord] | None]:
        """The gradient of the edges that leave a layer, through everything above it.

        Stored: what the sweep above left, and the sum over edges of the layer above. Recomputed: from the top down.
        """
        if self.options.edge_memory != "recompute":
            below = layer + 1
            e = self.edge(below, number, tile) if below < self.layers or self._top == layer else None
            if layer == self._top:
                d = self._top_gradient(number, tile, e) if below == self.layers else torch.zeros_like(e)
            else:
                d = self._rows(self._gradient_buffer(), tile).to(self.z.dtype)
            if below < self.layers:
                band = self._edge_sum_gradients[below]
                self.stages.edge_to_node_backward(tile, self.to_node[below], e, band, to_node, d)
            return d, None
        records, e = self._replay(number, tile)
        d = self._top_gradient(number, tile, e) if self._top == self.layers - 1 else torch.zeros_like(e)
        for above in reversed(range(layer, self._top + 1)):
            if above + 1 < self.layers:
                out = records[above + 1].e if above + 1 <= self._top else e
                into = to_node if above == layer else None
                band = self._edge_sum_gradients[above + 1]
                self.stages.edge_to_node_backward(tile, self.to_node[above + 1], out, band, into, d)
            if above > layer:
                d = self._layer_backward(above, number, tile, d, records, None, True)
        return d, records

    def _replay(self, number: int, tile: Tile) -> tuple[list[EdgeRecord], Tensor]:
        """Layers 0 … top of a tile, with all their backward needs → records, and the edges that leave the top."""
        records = []
        e = self.stages.edge_start(tile, self.x)
        for layer in range(self._top + 1):
            record = self._record(layer, number, tile, e, None)
            records.append(record)
            e = self.stages.norm_gelu(self.edge_weights[layer], record.s)
        return records, e

    def _record(self, layer: int, number: int, tile: Tile, e: Tensor, s: Tensor | None) -> EdgeRecord:
        w, keep = self.edge_weights[layer], self._keep(layer, number)
        e1, gate = self.stages.gate(tile, w, self.tokens[layer], e, keep)
        h = self._rows(self.h[layer], tile)
        if s is None:
            h = e.new_empty(tile.rows, 4 * self.dim, dtype=self.options.compute)
            s = self.stages.close(w, e1, *self.stages.hidden(w, e1, h))
        return EdgeRecord(e, keep, e1, gate, h, s)

    def _layer_backward(
        self,
        layer: int,
        number: int,
        tile: Tile,
        d: Tensor,
        records: list[EdgeRecord] | None,
        into: tuple[EdgeGradients, TokenSums] | None,
        want_edges: bool,
    ) -> Tensor | None:
        """Gradient of the edges that leave a layer → of those that enter it."""
        if records is None:
            s = self._rows(self.s[layer], tile).to(self.z.dtype)
            record = self._record(layer, number, tile, self.edge(layer, number, tile), s)
        else:
            record = records[layer]
        w = self.edge_weights[layer]
        gradients = into and into[0]
        ds = self.stages.norm_gelu_backward(w, record.s, d, gradients)
        de1 = self.stages.mlp_backward(w, record.e1, record.s, ds, record.h, gradients)
        return self.stages.gate_backward(
            tile, w, self.tokens[layer], record.e, record.keep, record.gate, de1, into, want_edges
        )

    def _start_sweep(self, want_z: bool) -> Tensor | None:
        """The first sum over edges and, if wanted, the edges' start: → dx̂ (n, D)."""
        to_node = self._to_node_gradients()
        dx = NodeSum(self.schedule, self.dim, like=self.z) if want_z else None
        band = self._edge_sum_gradients[0]
        for number, tile in enumerate(self.schedule.tiles):
            e = self.stages.edge_start(tile, self.x)
            d = None
            if want_z:
                if self._top < 0:
                    d = torch.zeros_like(e)
                elif self.options.edge_memory != "recompute":
                    d = self._rows(self._gradient_buffer(), tile).to(self.z.dtype)
                else:
                    d, records = self._gradient_above(0, number, tile, None)
                    d = self._layer_backward(0, number, tile, d, records, None, True)
            self.stages.edge_to_node_backward(tile, self.to_node[0], e, band, to_node, d)
            if want_z:
                self.stages.edge_start_backward(tile, self.x, d, dx)
        self._keep_to_node(0, to_node)
        return dx.total() if want_z else None

    # -- parts

    def gradient_buffer(self) -> Tensor:
        """Where the gradient of all edges lies between two sweeps (all rows, D)."""
        return self._gradient_buffer()

    def _gradient_buffer(self) -> Tensor:
        if self.buffer is None:
            self.buffer = self.z.new_empty(self.schedule.rows, self.dim, dtype=self.options.edge_dtype)
        return self.buffer

    def _to_node_gradients(self) -> tuple[Tensor, Tensor]:
        return self.z.new_zeros(self.dim, self.dim), self.z.new_zeros(self.dim)

    def _keep_to_node(self, layer: int, found: tuple[Tensor, Tensor]) -> None:
        at = f"layers.{layer}.node.edge_to_node"
        self.gradients[f"{at}.weight"], self.gradients[f"{at}.bias"] = found

    def _keep(self, layer: int, number: int) -> Tensor | None:
        source = self.masks[layer]
        return None if source is None else source(number)

    @staticmethod
    def _rows(store: Tensor | None, tile: Tile) -> Tensor | None:
        return None if store is None else store[tile.first_row : tile.first_row + tile.rows]
