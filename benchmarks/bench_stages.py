"""Each stage of the engine on one tile, plain torch against C++, matrix products included where a stage has them.

    python -m pytest benchmarks/bench_stages.py

C++ is held to plain torch in fp64 before anything is timed: |C++ - truth| ≤ 2 · max|torch - truth| + one rounding of
the products' dtype. A stage that fails is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gcahng.engine.head import DiversitySums, HeadGradients, HeadWeights
from gcahng.engine.masks import EdgeDropout
from gcahng.engine.mixing import mix_index, mixing_weights
from gcahng.engine.parts import make_parts
from gcahng.engine.schedule import Band, NodeSum, default_tile_rows, make_schedule
from gcahng.engine.stages import Edges, Tokens, TokenSums
from gcahng.engine.weights import EdgeGradients, EdgeWeights, ToNodeWeights
from gcahng.engine.workspace import Workspace
from gcahng.ops._implementations import available
from gcahng.testing import seeded

DIM, CLASSES, VIEWS = 256, 40, 3
PRECISIONS = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.float32)}
STAGES = ("edge_start", "edge_start_backward", "norm_gelu", "edge_to_node", "edge_to_node_backward", "gate")
STAGES += ("gate_backward", "hidden", "close", "mlp_backward", "head_moments", "head", "head_backward", "mix")
STAGES += ("mix_backward_theta", "mix_backward_z", "cross_entropy", "similarity", "diversity", "diversity_backward")


class Tile:
    """One tile's inputs, and each stage as a call that returns what it computed."""

    def __init__(self, impl: str, compute: torch.dtype, wide: torch.dtype) -> None:
        schedule = make_schedule(CLASSES, VIEWS, symmetric=True, tile_rows=default_tile_rows(DIM, torch.float32))
        self.schedule, self.tile, self.wide, self.compute = schedule, schedule.tiles[0], wide, compute
        dropout = EdgeDropout(0.1, 1, torch.zeros((), dtype=torch.int64))
        kappa = mixing_weights(self._drawn(VIEWS, VIEWS - 1, seed=0).sigmoid())
        z, pull = self._drawn(schedule.nodes, DIM, seed=1), torch.tensor(0.3, dtype=wide)
        self.nodes, self.pull = z, pull
        parts = make_parts(impl, schedule, compute, z, pull, kappa, dropout, 1, Workspace())
        self.stages, self.head, self.mixer, self.judge = parts
        rows = self.tile.rows
        self.x, self.ds = self._band(DIM, seed=2), self._band(DIM, seed=3)
        self.tokens = Tokens(self._band(DIM, seed=4), self._band(1, seed=5), self._band(DIM, seed=6))
        self.e, self.e1 = self._edges(rows, seed=7), self._edges(rows, seed=8)
        self.d = self._drawn(rows, DIM, seed=9)
        self.theta = self._drawn(rows, DIM, seed=10).sigmoid()
        mixes = self.tile.classes * VIEWS * (2 * self.tile.offsets - self.tile.mirrored)
        self.dn, self.dlogits = self._drawn(mixes, DIM, seed=11), self._drawn(mixes, seed=12)
        self.w, self.to_node, self.head_weights = self._weights()

    def _drawn(self, *shape: int, seed: int) -> Tensor:
        # Rounded to bf16, so that every precision starts from the same numbers.
        return seeded(*shape, seed=seed).to(torch.bfloat16).to(self.wide)

    def _band(self, width: int, seed: int) -> Band:
        return Band(self.schedule, self._drawn(self.schedule.nodes, width, seed=seed))

    def _edges(self, rows: int, seed: int) -> Edges:
        full = self._drawn(rows, DIM, seed=seed)
        return Edges(full, full.to(self.compute))

    def _matrix(self, rows: int, columns: int, seed: int) -> Tensor:
        return (self._drawn(rows, columns, seed=seed) * columns**-0.5).to(torch.bfloat16).to(self.compute)

    def _weights(self) -> tuple[EdgeWeights, ToNodeWeights, HeadWeights]:
        vectors = [self._drawn(DIM, seed=20 + k) for k in range(6)]
        w2 = self._matrix(DIM, 4 * DIM, seed=30)
        edge = EdgeWeights(
            w1=self._matrix(4 * DIM, DIM, seed=31),
            b1=self._drawn(4 * DIM, seed=32),
            w2=w2,
            w=w2.to(self.wide).sum(dim=1),
            d=vectors[0],
            gamma=vectors[1],
            beta=vectors[2],
        )
        fc, one = self._matrix(DIM, DIM, seed=33), torch.ones(DIM, dtype=self.wide)
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
        return edge, ToNodeWeights(self._matrix(DIM, DIM, seed=34), vectors[4]), head

    def _sum(self, width: int = DIM) -> NodeSum:
        return NodeSum(self.schedule, width, like=torch.zeros((), dtype=self.wide))

    def prepare(self, stage: str) -> Callable[[], list[Tensor]]:
        """The call of a stage; what comes before it is done here."""
        like = torch.zeros((), dtype=self.wide)
        self.into, self.edge_sum = TokenSums(self.schedule, DIM, like), self._sum()
        self.z_sum, self.positive_sum = self._sum(), self._sum(1)
        self.dx, self.diversity = self._sum(), DiversitySums(self.schedule, DIM, like)
        self.moments = torch.zeros(2, DIM, dtype=torch.float64)
        self.index = mix_index(self.schedule, self.tile, torch.device("cpu"))
        self.gate_record = self.stages.gate(0, 0, self.tile, self.w, self.tokens, self.e, "kept")[1]
        self.kept_h = torch.empty(self.tile.rows, 4 * DIM, dtype=self.compute)
        self.g, self.row_moments = self.stages.hidden(self.w, self.e1, self.kept_h, None)
        self.s = self.stages.close(self.w, self.e1, self.g, self.row_moments, None, "kept")[0].clone()
        self.edge_gradients, self.head_gradients = EdgeGradients(DIM, like), HeadGradients(DIM, like)
        self.weight_sums = torch.zeros(DIM, DIM, dtype=self.wide), torch.zeros(DIM, dtype=self.wide)
        return getattr(self, f"_{stage}")

    def _edge_start(self) -> list[Tensor]:
        return [self.stages.edge_start(self.tile, self.x, "out").full]

    def _edge_start_backward(self) -> list[Tensor]:
        self.stages.edge_start_backward(self.tile, self.x, self.d, self.dx)
        return [self.dx.wrapped]

    def _norm_gelu(self) -> list[Tensor]:
        return [self.stages.norm_gelu(self.w, self.d, "out").full]

    def _edge_to_node(self) -> list[Tensor]:
        self.stages.edge_to_node(self.tile, self.to_node, self.e, self.edge_sum)
        return [self.edge_sum.wrapped]

    def _edge_to_node_backward(self) -> list[Tensor]:
        de = self.d.clone()
        self.stages.edge_to_node_backward(self.tile, self.to_node, self.e, self.ds, self.weight_sums, de)
        return [de, *self.weight_sums]

    def _gate(self) -> list[Tensor]:
        return [self.stages.gate(0, 0, self.tile, self.w, self.tokens, self.e, "out")[0].full]

    def _gate_backward(self) -> list[Tensor]:
        into = (self.edge_gradients, self.into)
        arguments = (self.w, self.tokens, self.e, self.gate_record, self.d.clone(), into, True)
        de = self.stages.gate_backward(0, 0, self.tile, *arguments)
        return [de, self.into.u.wrapped, self.into.c.wrapped, self.into.v.wrapped]

    def _hidden(self) -> list[Tensor]:
        g, moments = self.stages.hidden(self.w, self.e1, None, None)
        return [g, *moments]

    def _close(self) -> list[Tensor]:
        s, e = self.stages.close(self.w, self.e1, self.g, self.row_moments, None, "out")
        return [s, e.full]

    def _mlp_backward(self) -> list[Tensor]:
        into = self.edge_gradients
        inputs = (self.e1, self.s, self.d.clone(), self.kept_h, self.row_moments, into)
        return [self.stages.mlp_backward(self.w, *inputs), into.w1, into.b1, into.out_g]

    def _head_moments(self) -> list[Tensor]:
        self.head.add_moments(self.tile, self.e, self.moments)
        return [self.moments]

    def _head(self) -> list[Tensor]:
        return [self.head.head(self.head_weights, self.e)]

    def _head_backward(self) -> list[Tensor]:
        into = self.head_gradients
        dy = self.head.head_backward(self.head_weights, self.e, self.theta, self.d, into)
        return [dy, into.pre_e, into.pre, into.sums]

    def _mix(self) -> list[Tensor]:
        return [self.mixer.negatives(self.tile, self.theta)]

    def _mix_backward_theta(self) -> list[Tensor]:
        return [self.mixer.backward_theta(self.tile, self.dn)]

    def _mix_backward_z(self) -> list[Tensor]:
        self.mixer.backward_z(self.tile, self.theta, self.dlogits, 1e-3, self.z_sum, self.positive_sum)
        return [self.z_sum.wrapped, self.positive_sum.wrapped]

    def _cross_entropy(self) -> list[Tensor]:
        logits = self.judge.logits(self.dn.to(self.compute), self.w.w1)  # a classifier of 4D classes
        loss, d = self.judge.cross_entropy(logits, self.w.b1, self.index.negative, 0.1, True)
        return [loss, d]

    def _similarity(self) -> list[Tensor]:
        counted, dn = self.index.anchor != self.index.negative, self.dn.clone()
        return [self.judge.similarity(self.nodes, self.index.node, self.dn, counted, 0.1, dn), dn]

    def _diversity(self) -> list[Tensor]:
        self.head.add_diversity(self.tile, self.theta, self.diversity)  # plain torch overwrites θ
        return [self.diversity.sum.wrapped, self.diversity.square.wrapped]

    def _diversity_backward(self) -> list[Tensor]:
        into = self.d.clone()
        self.head.diversity_backward(self.tile, self.theta, self.ds, self.pull, into)
        return [into]


def results(impl: str, precision: str, stage: str) -> list[Tensor]:
    return [x.double().clone() for x in Tile(impl, *PRECISIONS[precision]).prepare(stage)()]


def check(precision: str, stage: str) -> None:
    """Raises AssertionError where C++ is not as close to fp64 as plain torch is."""
    truth = [x.double() for x in Tile("torch", torch.float64, torch.float64).prepare(stage)()]
    plain, actual = results("torch", precision, stage), results("cpp", precision, stage)
    rounding = torch.finfo(PRECISIONS[precision][0]).eps / 2
    for place, (have, other, want) in enumerate(zip(actual, plain, truth, strict=True)):
        allowed = 2 * (other - want).abs().max() + rounding * want.abs().max()
        error = (have - want).abs().max()
        assert error <= allowed, f"{stage}, result {place}, is off by {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_stage(stage: str, precision: str, impl: str, benchmark: Any) -> None:
    reason = available("cpp", "cpu", "loss")
    assert reason is None, reason
    check(precision, stage)
    tile = Tile(impl, *PRECISIONS[precision])
    call = tile.prepare(stage)
    call()
    benchmark.group = f"{stage} {precision}"
    benchmark.extra_info["edges"] = tile.tile.rows
    benchmark(call)
