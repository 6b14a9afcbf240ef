"""Gate: attention of an edge to its two nodes, residual and LayerNorm(GELU(·)) (docs/math/gate.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.masks import MaskSource
from gcahng.engine.schedule import Band, NodeSum, Schedule, Tile
from gcahng.engine.schema import TileNumbers, Written, declare
from gcahng.engine.stages.common import Edges, Stage, StageContext
from gcahng.engine.stages.norm_gelu import NormGelu, norm_gelu_backward
from gcahng.engine.weights import EdgeGradients, EdgeWeights, NormWeights
from gcahng.reference.philox import dropout_threshold


class Tokens(NamedTuple):
    """A layer's gate inputs at nodes, as bands: U (D wide), c (1 wide), V (D wide)."""

    u: Band
    c: Band
    v: Band


class TokenSums:
    """Gradients of U, c and V, summed over edges."""

    def __init__(self, schedule: Schedule, dim: int, like: Tensor) -> None:
        self.u = NodeSum(schedule, dim, like=like)
        self.c = NodeSum(schedule, 1, like=like)
        self.v = NodeSum(schedule, dim, like=like)

    def totals(self) -> list[Tensor]:
        """dU (n, D), dc (n, 1) and dV (n, D) over all tiles; to be asked for once."""
        return [self.u.total(), self.c.total(), self.v.total()]


class Layer(NamedTuple):
    """What the edge update of a layer works with, beside a tile's edges.

    Attributes:
        number: the layer's place, from 0.
        weights: the edge MLP's and the norm's.
        closing: the same, but for the norm that the edges leave by (the last layer's takes on BatchNorm's statistics).
        tokens: the nodes' part of the attention.
    """

    number: int
    weights: EdgeWeights
    closing: EdgeWeights
    tokens: Tokens


class LayerSums(NamedTuple):
    """Where the gradients of a layer's weights and tokens are added up."""

    gradients: EdgeGradients
    tokens: TokenSums


class GateSaved(NamedTuple):
    """What the gate's backward needs of its forward.

    Attributes:
        weight_i, weight_j: attention weights of the edges' two nodes before dropout, (T, 1) or (A, K, O, K).
        mask: (A, K, O, K, 2), what dropout multiplies them with; in plain torch alone, where there is dropout.
        t: pre-norm sums (T, D); in plain torch alone.
    """

    weight_i: Tensor
    weight_j: Tensor
    mask: Tensor | None = None
    t: Tensor | None = None


# -- as ops


class GateDropout(NamedTuple):
    """seed; layer; threshold: a draw below it drops an attention weight; tied: both directions of an edge share it."""

    seed: int
    layer: int
    threshold: int
    tied: int


class GateTokens(NamedTuple):
    """u and v (classes + reach, K, D), c (classes + reach, K, 1)."""

    u: Tensor
    c: Tensor
    v: Tensor


class GateInputs(NamedTuple):
    """scale: what attention weights that are not dropped are multiplied with; draw (0-dim, int64): the number of the
    pass; e (T, D)."""

    tile: TileNumbers
    dropout: GateDropout
    scale: float
    draw: Tensor
    tokens: GateTokens
    norm: NormWeights
    e: Tensor


class GateOutputs(NamedTuple):
    """e1 (T, D), low (T, D): the same in the dtype of products; weight_i, weight_j (T, 1)."""

    e1: Written
    low: Written | None
    weight_i: Written
    weight_j: Written


class GateUpstream(NamedTuple):
    """de1 (T, D), the gradient of e1; the forward's attention weights (T, 1)."""

    de1: Tensor
    weight_i: Tensor
    weight_j: Tensor


class GateSums(NamedTuple):
    """Gradients that are added to: du, dc, dv as u, c, v; dgamma, dbeta (D,)."""

    du: Written
    dc: Written
    dv: Written
    dgamma: Written
    dbeta: Written


class GateGradients(NamedTuple):
    """de (T, D), which may be de1."""

    de: Written | None
    sums: GateSums | None


FORWARD = declare("gate_fwd_", "gate.forward", GateInputs, GateOutputs)
BACKWARD = declare("gate_bwd_", "gate.backward", GateInputs, GateUpstream, GateGradients)


# -- implementations


class Gate(Stage):
    """In plain torch."""

    def __init__(self, context: StageContext, norm_gelu: NormGelu) -> None:
        super().__init__(context)
        self._norm_gelu = norm_gelu
        self._masks = self._mask_sources(context)

    def forward(self, layer: Layer, tile: Tile, e: Edges, slot: str) -> tuple[Edges, GateSaved]:
        """e → e¹ (T, D), and what the backward needs.

        With ω = sigmoid((e·U_i + c_i − e·U_j − c_j)/√D), e¹ = LayerNorm(GELU(e + ω V_i + (1 − ω) V_j)).

        Args:
            layer: weights and tokens.
            tile: where the edges lie.
            e: edges that enter the layer.
            slot: a name for the memory of the result (see StageContext.scratch).
        """
        masks = self._masks[layer.number]
        mask = masks(tile) if masks is not None else None
        tokens = layer.tokens
        grid = self.context.grid(tile, e.full)
        anchors, views, offsets, _ = self.schedule.shape(tile)
        rows = e.full.view(anchors, views, offsets * views, self.dim)
        along_i = torch.matmul(rows, tokens.u.rows(tile)[..., None]).view(anchors, views, offsets, views)
        along_j = (grid * tokens.u.columns(tile)[:, None]).sum(dim=-1)
        c_i, c_j = tokens.c.rows(tile)[..., None], tokens.c.columns(tile)[:, None, ..., 0]
        logit = (along_i - along_j + (c_i - c_j)) * self.dim**-0.5
        weight_i, weight_j = torch.sigmoid(logit), torch.sigmoid(-logit)
        masked_i, masked_j = _masked(mask, weight_i, weight_j)
        t = torch.addcmul(grid, masked_i[..., None], tokens.v.rows(tile)[:, :, None, None])
        t.addcmul_(masked_j[..., None], tokens.v.columns(tile)[:, None])
        t = t.view(tile.rows, self.dim)
        return self._norm_gelu.forward(layer.weights.norm, t, slot), GateSaved(weight_i, weight_j, mask, t)

    def backward(
        self, layer: Layer, tile: Tile, e: Edges, saved: GateSaved, de1: Tensor, into: LayerSums | None, want_edge: bool
    ) -> Tensor | None:
        """de¹ (T, D) → de (T, D), if wanted. de¹ may be lost.

        Args:
            layer, tile, e: as in the forward.
            saved: what it returned.
            de1: gradient of e¹.
            into: where the gradients of the norm and of the tokens are added, if given.
            want_edge: whether de is wanted.
        """
        grid, tokens = self.context.grid(tile, e.full), layer.tokens
        norm_sums = None if into is None else into.gradients.norm
        dt = self.context.grid(tile, norm_gelu_backward(layer.weights.norm, saved.t, de1, norm_sums))
        v_i, v_j = tokens.v.rows(tile)[:, :, None, None], tokens.v.columns(tile)[:, None]
        d_i, d_j = _masked(saved.mask, (dt * v_i).sum(dim=-1), (dt * v_j).sum(dim=-1))
        dlogit = (d_i - d_j) * (saved.weight_i * saved.weight_j) * self.dim**-0.5
        if into is not None:
            sums = into.tokens
            masked_i, masked_j = _masked(saved.mask, saved.weight_i, saved.weight_j)
            scaled = dlogit[..., None] * grid
            sums.u.add_rows(tile, scaled.sum(dim=(2, 3)))
            sums.u.add_columns(tile, -scaled.sum(dim=1))
            sums.c.add_rows(tile, dlogit.sum(dim=(2, 3))[..., None])
            sums.c.add_columns(tile, -dlogit.sum(dim=1)[..., None])
            sums.v.add_rows(tile, (dt * masked_i[..., None]).sum(dim=(2, 3)))
            sums.v.add_columns(tile, (dt * masked_j[..., None]).sum(dim=1))
        if not want_edge:
            return None
        difference = tokens.u.rows(tile)[:, :, None, None] - tokens.u.columns(tile)[:, None]
        return dt.addcmul_(dlogit[..., None], difference).view(tile.rows, self.dim)

    def _mask_sources(self, context: StageContext) -> list[MaskSource | None]:
        if context.dropout is None:
            return [None] * context.layers
        dtype = context.like.dtype
        return [MaskSource(context.schedule, layer, context.dropout, dtype) for layer in range(context.layers)]


def _masked(mask: Tensor | None, at_i: Tensor, at_j: Tensor) -> tuple[Tensor, Tensor]:
    return (at_i, at_j) if mask is None else (at_i * mask[..., 0], at_j * mask[..., 1])


class FusedGate(Gate):
    """As fused ops, which draw their masks themselves."""

    def __init__(self, context: StageContext, norm_gelu: NormGelu) -> None:
        super().__init__(context, norm_gelu)
        dropout, like = context.dropout, context.like
        self._draw = dropout.draw if dropout else torch.zeros((), dtype=torch.int64, device=like.device)
        self._scale = 1 / (1 - dropout.p) if dropout else 1.0
        self._seed, self._threshold = (dropout.seed, dropout_threshold(dropout.p)) if dropout else (0, 0)

    def _mask_sources(self, context: StageContext) -> list[MaskSource | None]:
        return []

    def inputs(self, layer: Layer, tile: Tile, e: Edges) -> GateInputs:
        """The forward's inputs as the op takes them."""
        tokens = GateTokens(layer.tokens.u.wrapped, layer.tokens.c.wrapped, layer.tokens.v.wrapped)
        dropout = GateDropout(self._seed, layer.number, self._threshold, int(self.schedule.symmetric))
        tile_numbers = self.context.numbers(tile)
        return GateInputs(tile_numbers, dropout, self._scale, self._draw, tokens, layer.weights.norm, e.full)

    def room(self, slot: str, rows: int) -> tuple[Edges, GateSaved]:
        """Memory for the forward's results."""
        weights = (self.context.wide(f"{slot} {name}", rows, 1) for name in ("weight_i", "weight_j"))
        return self.context.edge_room(slot, rows), GateSaved(*weights)

    def forward(self, layer: Layer, tile: Tile, e: Edges, slot: str) -> tuple[Edges, GateSaved]:
        e1, saved = self.room(slot, tile.rows)
        outputs = GateOutputs(e1.full, self.context.low(e1), saved.weight_i, saved.weight_j)
        self.ops(FORWARD, self.inputs(layer, tile, e), outputs)
        return e1, saved

    def backward(
        self, layer: Layer, tile: Tile, e: Edges, saved: GateSaved, de1: Tensor, into: LayerSums | None, want_edge: bool
    ) -> Tensor | None:
        sums = None
        if into is not None:
            tokens, norm = into.tokens, into.gradients.norm
            sums = GateSums(tokens.u.wrapped, tokens.c.wrapped, tokens.v.wrapped, norm.gamma, norm.beta)
        de = de1 if want_edge else None
        upstream = GateUpstream(de1, saved.weight_i, saved.weight_j)
        self.ops(BACKWARD, self.inputs(layer, tile, e), upstream, GateGradients(de, sums))
        return de
