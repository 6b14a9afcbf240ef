"""One tile's inputs on a device, and each stage of the engine on it as a call that returns what it computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.engine.masks import EdgeDropout
from gcahng.engine.schedule import Band, NodeSum, make_schedule
from gcahng.engine.schema import Ops
from gcahng.engine.stages import make_stages, ops_of
from gcahng.engine.stages.common import Edges, StageContext
from gcahng.engine.stages.cross_entropy import CrossEntropyInputs
from gcahng.engine.stages.diversity import DiversitySums
from gcahng.engine.stages.edge_update import EdgeRecord
from gcahng.engine.stages.gate import Layer, LayerSums, Tokens, TokenSums
from gcahng.engine.stages.head import HeadGradients, HeadWeights
from gcahng.engine.stages.mix import MixUpstream, mixing_of, mixing_weights
from gcahng.engine.stages.mix_index import mix_index
from gcahng.engine.stages.similarity import SimilarityInputs
from gcahng.engine.weights import EdgeGradients, EdgeWeights, ToNodeSums, ToNodeWeights
from gcahng.engine.workspace import Workspace

# A stage's matrix products, in units of rows · D².
PRODUCTS = {
    "edge_start": 0,
    "edge_start_backward": 0,
    "norm_gelu": 0,
    "edge_to_node": 1,
    "edge_to_node_backward": 3,
    "gate": 0,
    "gate_backward": 0,
    "mlp_in": 4,
    "mlp_out": 4,
    "mlp_backward": 16,
    "head_moments": 0,
    "head": 1,
    "head_backward": 2,
    "norm_backward": 0,
    "mix": 0,
    "mix_logits": 0,
    "mix_backward_theta": 0,
    "mix_backward_z": 0,
    "cross_entropy": 0,  # by the classifier's own size, see Tile.flops
    "similarity": 0,
    "diversity": 0,
    "diversity_backward": 0,
}
STAGES = tuple(PRODUCTS)
LABELS = 100
ALL_PAIRS = 1 << 40  # rows of a tile that holds them


@dataclass(frozen=True)
class Size:
    """A tile of so many classes; accumulate, compute: dtypes; tile_rows: its edges at the most (all pairs)."""

    classes: int
    views: int
    dim: int
    accumulate: torch.dtype
    compute: torch.dtype
    device: str = "cpu"
    tile_rows: int = ALL_PAIRS


def rows_of(classes: int, views: int) -> int:
    """Edges of a Tile of all pairs."""
    return make_schedule(classes, views, symmetric=True, tile_rows=ALL_PAIRS).tiles[0].rows


class Tile:
    """A tile's inputs, and the stages of an implementation on them.

    Args:
        size: of the tile.
        impl: an implementation, as gcahng.dispatch names it.
        ops: instead of it, the ops of stages whose products are all the library's.
    """

    def __init__(self, size: Size, impl: str | None = None, ops: Ops | None = None) -> None:
        self.size, self.wide = size, size.accumulate
        self.schedule = make_schedule(size.classes, size.views, symmetric=True, tile_rows=size.tile_rows)
        self.tile = self.schedule.tiles[0]
        self.like = torch.zeros((), dtype=self.wide, device=size.device)
        self._generator = torch.Generator(device=size.device).manual_seed(0)
        self.fresh = True  # False: what a stage overwrites is not drawn anew for each call
        rows, dim, views = self.tile.rows, size.dim, size.views
        z = self._drawn(self.schedule.nodes, dim)
        kappa = mixing_weights(self._normal(views, views - 1).sigmoid()).to(self.wide)
        self.x, self.ds = self._band(dim), self._band(dim)
        self.tokens = Tokens(self._band(dim), self._band(1), self._band(dim))
        self.e, self.e1 = self._edges(rows), self._edges(rows)
        self.d, self.theta = self._drawn(rows, dim), self._normal(rows, dim).sigmoid().to(self.wide)
        mixes = self.tile.classes * views * (2 * self.tile.offsets - self.tile.mirrored)
        self.dn, self.other, self.dlogits = self._drawn(mixes, dim), self._drawn(mixes, dim), self._drawn(mixes)
        self.index, self.nodes = mix_index(self.schedule, self.tile, z.device), z
        self.classifier = self._matrix(LABELS, dim), self._drawn(LABELS)
        self.labels = self.index.negative % LABELS
        self.w, self.to_node, self.head_weights = self._weights()
        ops = ops or ops_of(impl)
        draw = torch.zeros((), dtype=torch.int64, device=size.device)
        fused = (Workspace(), ops) if ops is not None else (None, None)
        dropout = EdgeDropout(0.1, 1, draw)
        self.stages = make_stages(StageContext(self.schedule, dim, size.compute, self.like, dropout, 1, *fused))
        pull, u = torch.full_like(self.like, 0.3125), self.like.new_zeros(views, views - 1)
        self.mixing = mixing_of(self.stages.context, z, u, pull)._replace(kappa=kappa)
        self.layer = Layer(0, self.w, self.w, self.tokens)

    def flops(self, stage: str) -> int:
        """Of a stage's matrix products."""
        if stage == "cross_entropy":
            return 2 * self.dn.numel() * LABELS
        return 2 * PRODUCTS[stage] * self.tile.rows * self.size.dim**2

    def _normal(self, *shape: int) -> Tensor:
        # In fp32 for every precision, so that all start from the same numbers.
        return torch.randn(shape, generator=self._generator, device=self.size.device)

    def _drawn(self, *shape: int) -> Tensor:
        return self._normal(*shape).to(torch.bfloat16).to(self.wide)

    def _band(self, width: int) -> Band:
        return Band(self.schedule, self._drawn(self.schedule.nodes, width))

    def _edges(self, rows: int) -> Edges:
        full = self._drawn(rows, self.size.dim)
        return Edges(full, full.to(self.size.compute))

    def _matrix(self, rows: int, columns: int) -> Tensor:
        return (self._normal(rows, columns) * columns**-0.5).to(torch.bfloat16).to(self.size.compute)

    def _weights(self) -> tuple[EdgeWeights, ToNodeWeights, HeadWeights]:
        dim = self.size.dim
        w2 = self._matrix(dim, 4 * dim)
        vectors = [self._drawn(dim) for _ in range(6)]
        edge = EdgeWeights(
            w1=self._matrix(4 * dim, dim),
            b1=self._drawn(4 * dim),
            w2=w2,
            w=w2.to(self.wide).sum(dim=1),
            d=vectors[0],
            gamma=vectors[1],
            beta=vectors[2],
        )
        fc, one = self._matrix(dim, dim), torch.ones_like(vectors[0])
        head = HeadWeights(
            weight=fc,
            bias=vectors[3],
            weight_fc=fc,
            gamma=one,
            beta=0 * one,
            mean=0 * one,
            rstd=one,
            scale=one,
        )
        return edge, ToNodeWeights(self._matrix(dim, dim), vectors[4]), head

    def _sum(self, width: int) -> NodeSum:
        return NodeSum(self.schedule, width, like=self.like)

    def _upstream(self) -> Tensor:
        return self.d.clone() if self.fresh else self.d

    def prepare(self, stage: str) -> Callable[[], list[Tensor]]:
        """The call of a stage; what comes before it is done here, and sums start from zero."""
        dim, like, update = self.size.dim, self.like, self.stages.edge_update
        self.sums = LayerSums(EdgeGradients(dim, like), TokenSums(self.stages.context))
        self.edge_sum, self.dx = self._sum(dim), self._sum(dim)
        self.z_sum, self.positive_sum = self._sum(dim), self._sum(1)
        self.diversity, self.moments = DiversitySums(self.stages.context), self.stages.head.moments()
        self.head_gradients = HeadGradients(dim, like)
        self.to_node_sums = ToNodeSums(like.new_zeros(dim, dim), like.new_zeros(dim))
        if stage == "gate_backward":
            self.gate_saved = update.gate.forward(self.layer, self.tile, self.e, "saved")[1]
        if stage in ("mlp_out", "mlp_backward"):
            h = like.new_empty(self.tile.rows, 4 * dim, dtype=self.size.compute)
            self.g, self.row_moments = update.mlp_in.forward(self.w, self.e1, h, None)
            s, _ = update.mlp_out.forward(self.w, self.e1, self.g, self.row_moments, None, "saved")
            self.record = EdgeRecord(None, self.e1, None, h, self.row_moments, s.clone())
        return getattr(self, f"_{stage}")

    def _edge_start(self) -> list[Tensor]:
        return [self.stages.edge_start.forward(self.tile, self.x, "out").full]

    def _edge_start_backward(self) -> list[Tensor]:
        self.stages.edge_start.backward(self.tile, self.x, self.d, self.dx)
        return [self.dx.wrapped]

    def _norm_gelu(self) -> list[Tensor]:
        return [self.stages.norm_gelu.forward(self.w.norm, self.e.full, "out").full]

    def _edge_to_node(self) -> list[Tensor]:
        self.stages.edge_to_node.forward(self.tile, self.to_node, self.e, self.edge_sum)
        return [self.edge_sum.wrapped]

    def _edge_to_node_backward(self) -> list[Tensor]:
        de = self._upstream()
        self.stages.edge_to_node.backward(self.tile, self.to_node, self.e, self.ds, self.to_node_sums, de)
        return [de, *self.to_node_sums]

    def _gate(self) -> list[Tensor]:
        # Plain torch keeps the masks it has drawn for the sweep at hand; every sweep draws them again.
        gate = self.stages.edge_update.gate
        for masks in gate._masks:
            masks._drawn.clear()
        return [gate.forward(self.layer, self.tile, self.e, "out")[0].full]

    def _gate_backward(self) -> list[Tensor]:
        gate, (gradients, tokens) = self.stages.edge_update.gate, self.sums
        de = gate.backward(self.layer, self.tile, self.e, self.gate_saved, self._upstream(), self.sums, True)
        return [de, *(x.wrapped for x in (tokens.u, tokens.c, tokens.v)), *gradients.norm]

    def _mlp_in(self) -> list[Tensor]:
        g, moments = self.stages.edge_update.mlp_in.forward(self.w, self.e1, None, None)
        return [g, *moments]

    def _mlp_out(self) -> list[Tensor]:
        s, e = self.stages.edge_update.mlp_out.forward(self.w, self.e1, self.g, self.row_moments, None, "out")
        return [s, e.full]

    def _mlp_backward(self) -> list[Tensor]:
        into = self.sums.gradients
        de1 = self.stages.edge_update.mlp_backward(self.layer, self.record, self._upstream(), into)
        return [de1, into.w1, into.b1, into.out_g, into.out, into.out_mean]

    def _head_moments(self) -> list[Tensor]:
        self.stages.head.add_moments(self.tile, self.e, self.moments)
        return [self.moments]

    def _head(self) -> list[Tensor]:
        return [self.stages.head.forward(self.head_weights, self.e)]

    def _head_backward(self) -> list[Tensor]:
        into = self.head_gradients
        dy = self.stages.head.backward(self.head_weights, self.e, self.theta, self.d, into)
        return [dy, into.pre_e, into.pre, into.sums]

    def _norm_backward(self) -> list[Tensor]:
        head, dy = self.stages.head, self._upstream()
        return [head.norm_backward(self.tile, self.head_weights, self.e, dy, self.head_gradients)]

    def _mix(self) -> list[Tensor]:
        return [self.stages.mix.negatives(self.mixing, self.tile, self.theta)]

    def _mix_logits(self) -> list[Tensor]:
        logits, squares = self.theta.new_empty(2, len(self.dlogits))
        self.stages.mix.logits(self.mixing, self.tile, self.theta, logits, squares)
        return [logits, squares]

    def _mix_backward_theta(self) -> list[Tensor]:
        return [self.stages.mix.backward_theta(self.mixing, self.tile, self.dn)]

    def _mix_backward_z(self) -> list[Tensor]:
        upstream = MixUpstream(self.theta, self.dlogits, 1e-3, None)
        self.stages.mix.backward_z(self.mixing, self.tile, upstream, self.z_sum, self.positive_sum)
        return [self.z_sum.wrapped, self.positive_sum.wrapped]

    def _cross_entropy(self) -> list[Tensor]:
        weight, bias = self.classifier
        logits = self.stages.cross_entropy.logits(self.dn.to(self.size.compute), weight)
        inputs = CrossEntropyInputs(logits, bias, self.labels, 0.25)
        loss = bias.new_empty(len(self.labels))
        d = self.stages.cross_entropy.forward(inputs, loss, True)
        return [loss, d]

    def _similarity(self) -> list[Tensor]:
        dn = self.dn.clone() if self.fresh else self.dn
        counted = self.index.anchor != self.index.negative
        inputs = SimilarityInputs(self.nodes, self.index.node, self.other, counted, 0.25)
        loss = dn.new_empty(len(dn))
        self.stages.similarity.forward(inputs, loss, dn)
        return [loss, dn]

    def _diversity(self) -> list[Tensor]:
        self.stages.diversity.forward(self.tile, self.theta, self.diversity)  # plain torch overwrites θ
        return [self.diversity.sum.wrapped, self.diversity.square.wrapped]

    def _diversity_backward(self) -> list[Tensor]:
        into = self._upstream()
        self.stages.diversity.backward(self.tile, self.theta, self.ds, self.like + 0.3125, into)
        return [into]
