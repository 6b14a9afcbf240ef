"""The dropout masks that the gate of every backend applies are the reference's."""

from __future__ import annotations

import pytest
import torch
from stages.backends import TRITON
from stages.checks import case
from torch import Tensor

from gcahng.engine.masks import EdgeDropout, _nodes
from gcahng.engine.schedule import Band, Schedule, Tile, make_schedule
from gcahng.engine.stages import make_stages
from gcahng.engine.stages.common import Edges, StageContext
from gcahng.engine.stages.edge_update import Saving
from gcahng.engine.stages.gate import Layer, Tokens
from gcahng.engine.weights import EdgeWeights
from gcahng.engine.workspace import Workspace
from gcahng.reference.philox import edge_dropout_masks, philox_4x32

SEEDS = (7, 2**63 - 1, (5 << 32) + 3)
DRAWS = (0, 3, 2**31 + 5)
LAYERS = (0, 1, 3)
CHANCES = (0.1, 0.5, 0.9)
CPU, DIM, STEP = torch.device("cpu"), 4, 4.0
SCHEDULES = ((3, 2, True, 12), (3, 2, False, 12), (4, 3, True, 1000), (2, 3, False, 1000))


def wanted_masks(n: int, *, layer: int, dropout: EdgeDropout, symmetric: bool) -> Tensor:
    """(n, n, 2): 0 or 1/(1-p)."""
    p, seed, draw = dropout
    mask = edge_dropout_masks(n, layer=layer, draw=draw.cpu(), seed=seed, p=p, symmetric=symmetric)
    return mask.double() / (1 - p)


class GateMasks:
    """What the gate multiplies the attention weights of i and j with; both in one where i = j: their sum.

    With U = c = 0 both attention weights are ½, so the gate's sum is t = e + ½ (mask_i v_i + mask_j v_j), and with V =
    0 for all nodes but one, its edges show that one's mask. GELU is the identity where t is large, and the LayerNorm
    is undone by two channels that V leaves alone, 20 apart.
    """

    def __init__(self, ops, schedule: Schedule, number: int, dropout: EdgeDropout) -> None:
        device = dropout.draw.device
        self.schedule, self.number = schedule, number
        self.e = torch.tensor([10.0, 20.0, 30.0, 50.0], device=device)
        context = StageContext(schedule, DIM, torch.float32, self.e, dropout, number + 1, Workspace(), ops)
        self.stages = make_stages(context)
        one, wide = torch.ones_like(self.e), self.e.new_zeros(4 * DIM, DIM)
        zero = 0 * one
        self.weights = EdgeWeights(wide, wide[:, 0].contiguous(), wide.T.contiguous(), zero, zero, one, zero)

    def of(self, tile: Tile, *, whole: bool) -> Tensor:
        """(T, 2). whole: in the kernel of a whole edge update."""
        n, ends = self.schedule.nodes, _nodes(self.schedule, tile, CPU)
        edges = self.e.expand(tile.rows, DIM).contiguous()
        u, c = (Band(self.schedule, self.e.new_zeros(n, width)) for width in (DIM, 1))
        found = torch.full((tile.rows, 2), torch.nan, dtype=self.e.dtype)
        for node in range(n):
            v = self.e.new_zeros(n, DIM)
            v[node, 0] = STEP
            layer = Layer(self.number, self.weights, self.weights, Tokens(u, c, Band(self.schedule, v)))
            update, given = self.stages.edge_update, (layer, tile, Edges(edges, edges))
            if whole:
                _, out, saved = update.forward(*given, Saving("e1"), "out")
            else:
                out, saved = update.gate.forward(*given, "e1")
            assert torch.equal(saved.weight_i, torch.full_like(saved.weight_i, 0.5))
            assert torch.equal(saved.weight_j, saved.weight_i)
            y, e = out.full.cpu(), self.e.cpu()
            t = e[2] + (y[:, 0] - y[:, 2]) * ((e[3] - e[2]) / (y[:, 3] - y[:, 2]))
            for side in range(2):
                mine = ends[side] == node
                found[mine, side] = ((t - e[0]) / (0.5 * STEP))[mine]
        return found


def check_masks(ops, schedule: Schedule, number: int, dropout: EdgeDropout, *, whole: bool = False) -> None:
    """They are the reference's, on every tile."""
    masks = GateMasks(ops, schedule, number, dropout)
    wanted = wanted_masks(schedule.nodes, layer=number, dropout=dropout, symmetric=schedule.symmetric)
    for tile in schedule.tiles:
        i, j = _nodes(schedule, tile, CPU)
        mask = wanted[i, j]
        mask = torch.where((i == j)[:, None], mask.sum(dim=1, keepdim=True), mask)
        # 0, 1/(1-p) and twice that are more than 1 apart.
        torch.testing.assert_close(masks.of(tile, whole=whole).double(), mask, rtol=1e-3, atol=1e-3)


def test_masks(backend):
    """In fp32: a mask does not depend on the dtype."""
    numbers = list(zip(LAYERS, SEEDS, DRAWS, CHANCES, strict=True))
    for k, (classes, views, symmetric, rows) in enumerate(SCHEDULES):
        schedule = make_schedule(classes, views, symmetric=symmetric, tile_rows=rows)
        # Triton's interpreter is slow, and test_gate_factors.py tries all numbers at once.
        for layer, seed, draw, p in [numbers[k % len(numbers)]] if backend is TRITON else numbers:
            dropout = EdgeDropout(p, seed, torch.tensor(draw, device=backend.device))
            with case(classes, views, symmetric, rows, layer, seed, draw, p):
                check_masks(backend.ops, schedule, layer, dropout)


@pytest.mark.simulated
@pytest.mark.parametrize(("number", "schedule"), [(1, (3, 2, True, 12)), (2, (2, 3, False, 1000))])
def test_masks_of_a_whole_update(triton, number, schedule):
    classes, views, symmetric, rows = schedule
    dropout = EdgeDropout(CHANCES[number], SEEDS[number], torch.tensor(DRAWS[number]))
    schedule = make_schedule(classes, views, symmetric=symmetric, tile_rows=rows)
    check_masks(triton.ops, schedule, LAYERS[number], dropout, whole=True)


def test_a_draw_at_the_threshold_stays(backend):
    """Of the two words of an edge, each in turn."""
    layer, seed, draw = 1, 7, torch.tensor(3)
    zero, one = torch.zeros_like(draw), torch.ones_like(draw)
    schedule = make_schedule(2, 2, symmetric=True, tile_rows=100)
    for word in philox_4x32((zero, one, layer * one, draw), seed)[:2]:
        dropout = EdgeDropout(int(word) / 2**32, seed, draw.to(backend.device))
        check_masks(backend.ops, schedule, layer, dropout)
