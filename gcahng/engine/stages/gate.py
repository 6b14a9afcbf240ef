"""Gate: attention of an edge to its two nodes, residual and LayerNorm(GELU(·)) (docs/math/gate.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.masks import MaskSource
from gcahng.engine.schedule import Band, Tile, totals
from gcahng.engine.schema import TileNumbers, Written, declare
from gcahng.engine.stages.common import Edges, Stage, StageContext
from gcahng.engine.stages.norm_gelu import NormGelu, norm_gelu_backward
from gcahng.engine.weights import EdgeGradients, EdgeWeights, NormWeights
from gcahng.reference.philox import dropout_threshold


class Tokens(NamedTuple):
    """A layer's gate inputs at nodes, as bands.

    Attributes:
        u: U (n, D), the keys times the query's weight.
        c: c (n, 1), the keys times the query's bias.
        v: values V (n, D).
    """

    u: Band
    c: Band
    v: Band


class TokenSums:
    """Gradients of a layer's tokens, summed over edges.

    Args:
        context: what all stages of the pass work with.

    Attributes:
        u: dU.
        c: dc.
        v: dV.
    """

    def __init__(self, context: StageContext) -> None:
        self.u, self.c, self.v = context.node_sums({"du": context.dim, "dc": 1, "dv": context.dim})

    def totals(self) -> list[Tensor]:
        """dU (n, D), dc (n, 1) and dV (n, D) over all tiles. To be called once, since it adds in place."""
        return totals(self.u, self.c, self.v)


class Layer(NamedTuple):
    """What the edge update of a layer works with, beside a tile's edges.

    Attributes:
        number: the layer's place, from 0.
        weights: the parameters of edge MLP and edge norm.
        closing: the same, except for the norm that the edges leave by. That of the last layer takes on the BatchNorm's
            statistics.
        tokens: the nodes' part of the attention.
    """

    number: int
    weights: EdgeWeights
    closing: EdgeWeights
    tokens: Tokens


class LayerSums(NamedTuple):
    """Where the gradients of a layer's weights and tokens are added up.

    Attributes:
        gradients: those of the weights.
        tokens: those of the tokens.
    """

    gradients: EdgeGradients
    tokens: TokenSums


class GateSaved(NamedTuple):
    """What the gate's backward needs of its forward.

    Attributes:
        weight_i: attention weight of each edge's first node before dropout, (T, 1) or (A, K, O, K).
        weight_j: that of its second node.
        mask: what dropout multiplies the two weights with (A, K, O, K, 2). Plain torch alone saves it, with dropout.
        t: pre-norm sums (T, D). Plain torch alone saves them.
    """

    weight_i: Tensor
    weight_j: Tensor
    mask: Tensor | None = None
    t: Tensor | None = None


# -- as ops


class GateDropout(NamedTuple):
    """The dropout of one layer, in whole numbers.

    Attributes:
        seed: of the random numbers.
        layer: the layer's number.
        threshold: a random number below it drops an attention weight.
        tied: 1 if both directions of an edge share a draw, else 0.
    """

    seed: int
    layer: int
    threshold: int
    tied: int


class GateTokens(NamedTuple):
    """A layer's gate inputs at nodes (see Tokens).

    Attributes:
        u: (classes + reach, K, D).
        c: (classes + reach, K, 1).
        v: (classes + reach, K, D).
    """

    u: Tensor
    c: Tensor
    v: Tensor


class GateInputs(NamedTuple):
    """What both directions take.

    Attributes:
        tile: where the edges lie.
        dropout: which attention weights are dropped.
        scale: what the other attention weights are multiplied with, 1 / (1 − p).
        draw: number of the pass, 0-dim int64.
        tokens: the nodes' part of the attention.
        norm: the LayerNorm behind the gate.
        e: edges that enter the layer (T, D).
    """

    tile: TileNumbers
    dropout: GateDropout
    scale: float
    draw: Tensor
    tokens: GateTokens
    norm: NormWeights
    e: Tensor


class GateOutputs(NamedTuple):
    """What the forward writes.

    Attributes:
        e1: e¹ (T, D) in the accumulating dtype.
        low: e¹ (T, D) in the dtype of products; None if the two dtypes agree.
        weight_i: attention weight of each edge's first node before dropout (T, 1).
        weight_j: that of its second node (T, 1).
    """

    e1: Written
    low: Written | None
    weight_i: Written
    weight_j: Written


class GateUpstream(NamedTuple):
    """What the backward takes beside the forward's inputs.

    Attributes:
        de1: gradient of e¹ (T, D).
        weight_i: what the forward wrote (T, 1).
        weight_j: what the forward wrote (T, 1).
    """

    de1: Tensor
    weight_i: Tensor
    weight_j: Tensor


class GateSums(NamedTuple):
    """Gradients that the backward adds to.

    Attributes:
        du: of U (classes + reach, K, D).
        dc: of c (classes + reach, K, 1).
        dv: of V (classes + reach, K, D).
        dgamma: of the norm's γ (D,).
        dbeta: of the norm's β (D,).
    """

    du: Written
    dc: Written
    dv: Written
    dgamma: Written
    dbeta: Written


class GateGradients(NamedTuple):
    """What the backward writes; None where it is not wanted.

    Attributes:
        de: gradient of e (T, D), which may be the memory of de1.
        sums: gradients of tokens and norm.
    """

    de: Written | None
    sums: GateSums | None


declare("gate_fwd_", "gate.forward", GateInputs, GateOutputs)
declare("gate_bwd_", "gate.backward", GateInputs, GateUpstream, GateGradients)


# -- implementations


class Gate(Stage):
    """The gate in plain torch.

    Args:
        context: what all stages of the pass work with.
        norm_gelu: the norm behind the gate.
    """

    def __init__(self, context: StageContext, norm_gelu: NormGelu) -> None:
        super().__init__(context)
        self._norm_gelu = norm_gelu
        self._masks = self._mask_sources(context)

    def forward(self, layer: Layer, tile: Tile, e: Edges, slot: str) -> tuple[Edges, GateSaved]:
        """Computes e¹, and saves what the backward needs.

        With ω = sigmoid((e·U_i + c_i − e·U_j − c_j)/√D), e¹ = LayerNorm(GELU(e + ω V_i + (1 − ω) V_j)).

        Args:
            layer: weights and tokens.
            tile: where the edges lie.
            e: edges that enter the layer.
            slot: a name for the memory of the result (see StageContext.scratch).

        Returns:
            e¹ (T, D), and what is saved.
        """
        masks = self._masks[layer.number]
        mask = masks(tile) if masks is not None else None
        tokens = layer.tokens
        full = self.context.full(e.full)
        grid = self.context.grid(tile, full)
        anchors, views, offsets, _ = self.schedule.shape(tile)
        rows = full.view(anchors, views, offsets * views, self.dim)
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
        """Differentiates the gate.

        Args:
            layer: as in the forward.
            tile: as in the forward.
            e: as in the forward.
            saved: what the forward saved.
            de1: gradient of e¹ (T, D), which may be overwritten.
            into: the gradients of norm and tokens, which are added to; None if they are not wanted.
            want_edge: whether the gradient of e is wanted.

        Returns:
            The gradient of e (T, D), or None.
        """
        grid, tokens = self.context.grid(tile, self.context.full(e.full)), layer.tokens
        norm_sums, full = None if into is None else into.gradients.norm, self.context.full(de1)
        dt = self.context.grid(tile, norm_gelu_backward(layer.weights.norm, saved.t, full, norm_sums))
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
        return self.context.rounded(dt.addcmul_(dlogit[..., None], difference).view(tile.rows, self.dim))

    def _mask_sources(self, context: StageContext) -> list[MaskSource | None]:
        """Each layer's masks; None without dropout."""
        if context.dropout is None:
            return [None] * context.layers
        dtype = context.like.dtype
        return [MaskSource(context.schedule, layer, context.dropout, dtype) for layer in range(context.layers)]


def _masked(mask: Tensor | None, x_i: Tensor, x_j: Tensor) -> tuple[Tensor, Tensor]:
    """Values (A, K, O, K) of the edges' first and second nodes, times their masks."""
    return (x_i, x_j) if mask is None else (x_i * mask[..., 0], x_j * mask[..., 1])


class FusedGate(Gate):
    """The gate as fused ops, which draw their masks themselves."""

    def __init__(self, context: StageContext, norm_gelu: NormGelu) -> None:
        super().__init__(context, norm_gelu)
        dropout, like = context.dropout, context.like
        self._draw = dropout.draw if dropout else torch.zeros((), dtype=torch.int64, device=like.device)
        self._scale = 1 / (1 - dropout.p) if dropout else 1.0
        self._seed, self._threshold = (dropout.seed, dropout_threshold(dropout.p)) if dropout else (0, 0)

    def _mask_sources(self, context: StageContext) -> list[MaskSource | None]:
        return []

    def inputs(self, layer: Layer, tile: Tile, e: Edges) -> GateInputs:
        """The forward's inputs in the form in which the op takes them."""
        tokens = GateTokens(layer.tokens.u.wrapped, layer.tokens.c.wrapped, layer.tokens.v.wrapped)
        dropout = GateDropout(self._seed, layer.number, self._threshold, int(self.schedule.symmetric))
        tile_numbers = self.context.numbers(tile)
        return GateInputs(tile_numbers, dropout, self._scale, self._draw, tokens, layer.weights.norm, e.full)

    def room(self, slot: str, rows: int) -> tuple[Edges, GateSaved]:
        """Memory for what the forward returns; see StageContext.scratch for `slot`."""
        weights = (self.context.wide(f"{slot} {name}", rows, 1) for name in ("weight_i", "weight_j"))
        return self.context.edge_room(slot, rows), GateSaved(*weights)

    def forward(self, layer: Layer, tile: Tile, e: Edges, slot: str) -> tuple[Edges, GateSaved]:
        e1, saved = self.room(slot, tile.rows)
        outputs = GateOutputs(e1.full, self.context.low(e1), saved.weight_i, saved.weight_j)
        self.ops.gate_fwd_(self.inputs(layer, tile, e), outputs)
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
        self.ops.gate_bwd_(self.inputs(layer, tile, e), upstream, GateGradients(de, sums))
        return de
