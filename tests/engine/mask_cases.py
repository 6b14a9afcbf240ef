"""Dropout masks as they should be, and as the gate of an implementation with fused stages applies them."""

from __future__ import annotations

import torch
from gcahng.engine.fused import FusedStages, stage_ops
from torch import Tensor

from gcahng.engine.masks import EdgeDropout, _nodes
from gcahng.engine.schedule import Band, Schedule, make_schedule
from gcahng.engine.stages import Edges, Keep, Tokens
from gcahng.engine.weights import EdgeWeights
from gcahng.engine.workspace import Workspace
from gcahng.reference.philox import edge_dropout_masks, philox_4x32

CPU = torch.device("cpu")
SEEDS = (7, 2**63 - 1, (5 << 32) + 3)
DRAWS = (0, 3, 2**31 + 5)
LAYERS = (0, 1, 3)
CHANCES = (0.1, 0.5, 0.9)


def wanted_masks(n: int, *, layer: int, dropout: EdgeDropout, symmetric: bool) -> Tensor:
    """(n, n, 2): 0 or 1/(1-p)."""
    keep = edge_dropout_masks(n, layer=layer, draw=dropout.draw, seed=dropout.seed, p=dropout.p, symmetric=symmetric)
    return keep.double() / (1 - dropout.p)


def gate_masks(
    impl: str, schedule: Schedule, layer: int, dropout: EdgeDropout, dtype: torch.dtype, whole: bool = False
) -> dict[int, Tensor]:
    """What the gate multiplies the weights of i and j with, (T, 2) a tile; both in one where i = j: their sum. whole:
    the gate in Triton's kernel of a whole edge update.

    With U = c = 0 both attention weights are ½, so the gate's sum is t = e + ½ (keep_i v_i + keep_j v_j), and with V =
    0 for all nodes but one, its edges show that one's keep. GELU is the identity where t is large, and the LayerNorm
    is undone by two channels that V leaves alone, 20 apart.
    """
    n, dim, step = schedule.nodes, 4, 4.0
    e = torch.tensor([10.0, 20.0, 30.0, 50.0], dtype=dtype)
    zero, one = torch.zeros(dim, dtype=dtype), torch.ones(dim, dtype=dtype)
    stages = FusedStages(schedule, dim, dtype, e, dropout, layer + 1, Workspace(), stage_ops(impl))
    if whole:
        from gcahng.engine.triton import TritonStages

        stages = TritonStages(schedule, dim, dtype, e, dropout, layer + 1, Workspace(), stage_ops(impl))
    wide, tall = (torch.zeros(4 * dim, dim, dtype=dtype) for _ in range(2))
    w = EdgeWeights(wide, wide[:, 0].contiguous(), tall.T.contiguous(), zero, zero, gamma=one, beta=zero)
    u, c = (Band(schedule, torch.zeros(n, width, dtype=dtype)) for width in (dim, 1))
    found = {}
    for number, tile in enumerate(schedule.tiles):
        edges = e.expand(tile.rows, dim).contiguous()
        ends = _nodes(schedule, tile, CPU)
        found[number] = torch.full((tile.rows, 2), float("nan"), dtype=dtype)
        for node in range(n):
            v = torch.zeros(n, dim, dtype=dtype)
            v[node, 0] = step
            tokens, given = Tokens(u, c, Band(schedule, v)), Edges(edges, edges)
            if whole:
                keep = Keep("e1", None, None, None)
                _, out, gate = stages.update(layer, number, tile, w, w, tokens, given, keep, "out")
            else:
                out, gate = stages.gate(layer, number, tile, w, tokens, given, "e1")
            assert torch.equal(gate.p, torch.full_like(gate.p, 0.5)) and torch.equal(gate.q, gate.p)
            y = out.full
            t = e[2] + (y[:, 0] - y[:, 2]) * ((e[3] - e[2]) / (y[:, 3] - y[:, 2]))
            for side in range(2):
                mine = ends[side] == node
                found[number][mine, side] = ((t - e[0]) / (0.5 * step))[mine]
    return found


def assert_gate_masks(
    impl: str, schedule: Schedule, layer: int, dropout: EdgeDropout, dtype: torch.dtype, whole: bool = False
) -> None:
    """They are the reference's, on every tile."""
    wanted = wanted_masks(schedule.nodes, layer=layer, dropout=dropout, symmetric=schedule.symmetric)
    for number, found in gate_masks(impl, schedule, layer, dropout, dtype, whole).items():
        i, j = _nodes(schedule, schedule.tiles[number], CPU)
        keep = wanted[i, j]
        keep = torch.where((i == j)[:, None], keep.sum(dim=1, keepdim=True), keep)
        # 0, 1/(1-p) and twice that are more than 1 apart.
        torch.testing.assert_close(found.double(), keep, rtol=1e-3, atol=1e-3)


def assert_a_draw_at_the_threshold_is_kept(impl: str) -> None:
    """Of the two words of an edge, each in turn."""
    layer, seed, draw = 1, 7, torch.tensor(3)
    zero, one = torch.zeros_like(draw), torch.ones_like(draw)
    schedule = make_schedule(2, 2, symmetric=True, tile_rows=100)
    for word in philox_4x32((zero, one, layer * one, draw), seed)[:2]:
        assert_gate_masks(impl, schedule, layer, EdgeDropout(int(word) / 2**32, seed, draw), torch.float32)
