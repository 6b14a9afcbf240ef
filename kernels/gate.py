"""Gate: an edge's attention to its two tokens, residual and LayerNorm(GELU(·)), and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from gcahng.kernels.configs import ENDS, GATE, GATE_BACKWARD
from gcahng.kernels.functions import dropped_tokens, logistic, norm_gelu, norm_gelu_backward
from gcahng.kernels.launch import compute_type, row_block
from gcahng.kernels.sums import add_partials, partials
from gcahng.kernels.tiles import (
    TILE,
    add_nodes,
    column_part,
    launch_places,
    node_parts,
    place_of,
    row_part,
    row_places,
    wrapped,
)

if TYPE_CHECKING:
    from gcahng.engine.stages.gate import GateDropout, GateGradients, GateInputs, GateOutputs, GateUpstream

DROPOUT = ("seed", "layer", "threshold")


def dropout_arguments(
    dropout: GateDropout | Sequence[int], scale: float
) -> tuple[tuple[int, int, int], dict[str, float | bool]]:
    """As arguments of kernels: (seed, layer, threshold), and constants: a float argument would be rounded to fp32."""
    seed, layer, threshold, tied = dropout
    return (seed, layer, threshold), {"SCALE": scale, "TIED": bool(tied), "DROP": threshold != 0}


# -- what the kernel of a whole edge update shares


@triton.jit
def factors(
    o_i,
    o_j,
    nodes,
    seed,
    layer,
    threshold,
    p_draw,  # (1,)
    SCALE: tl.constexpr,
    TIED: tl.constexpr,
    DROP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """What dropout multiplies the attention weights of i and of j with; o_i, o_j: places in a wrapped tensor."""
    b_scale = tl.full(o_j.shape, SCALE, COMPUTE)
    if DROP:
        draw = tl.load(p_draw).to(tl.uint32)
        b_no_i, b_no_j = dropped_tokens(o_i, wrapped(o_j, nodes), seed, layer, threshold, draw, TIED)
        return tl.where(b_no_i, 0.0, b_scale), tl.where(b_no_j, 0.0, b_scale)
    else:
        return b_scale, b_scale


@triton.jit
def attention(e, u_i, u_j, c, ROOT: tl.constexpr):
    """The attention weights of i and j, whose sum is 1 (R,), of edges e (R, BLOCK_D) by their tokens.

    c (R,): that of i less that of j.
    """
    b_logit = (tl.sum(e * (u_i - u_j), axis=1) + c) * ROOT
    return logistic(b_logit), logistic(-b_logit)


@triton.jit
def gate_sum(e, masked_i, v_i, masked_j, v_j):
    """The sum t (R, BLOCK_D) before the norm, by the attention weights (R,) behind dropout's mask."""
    return e + masked_i[:, None] * v_i + masked_j[:, None] * v_j


# -- kernels


@triton.jit
def first_places(a, i, K, O, first, offset):
    """Of an anchor's view i (int64 each): its place in a wrapped tensor, that of its first column, and its first row.

    The places of all of its columns, and of their channels, are counted from there in 32 bits to spare registers.
    """
    return (first + a) * K + i, (first + a + offset) * K, (a * K + i) * O * K


@triton.jit(do_not_specialize=[*TILE, *DROPOUT])
def gate_forward_kernel(
    p_u,  # (classes + reach, K, D)
    p_c,  # (classes + reach, K)
    p_v,  # (classes + reach, K, D)
    p_gamma,  # (D,)
    p_beta,  # (D,)
    p_e,  # (A, K, O, K, D)
    p_e1,  # (A, K, O, K, D)
    p_low,  # (A, K, O, K, D) or None
    p_weight_i,  # (A, K, O, K)
    p_weight_j,  # (A, K, O, K)
    p_draw,  # (1,)
    A,
    K,
    O,
    first,
    offset,
    mirrored,
    classes,
    D: tl.constexpr,
    seed,
    layer,
    threshold,
    ROOT: tl.constexpr,
    SCALE: tl.constexpr,
    TIED: tl.constexpr,
    DROP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,  # 1
    BLOCK_D: tl.constexpr,
):
    """One program: an anchor i and BLOCK_C of its columns."""
    a, i, _, o_c, o_d, m_c, m_d, m_cd = place_of(K, O, D, 0, BLOCK_C, BLOCK_V, BLOCK_D)
    first_i, first_j, first_row = first_places(a, i, K, O, first, offset)
    o = o_c[:, None] * D + o_d[None, :]
    b_e = tl.load(p_e + first_row * D + o, mask=m_cd, other=0.0).to(COMPUTE)
    b_u_i = tl.load(p_u + first_i * D + o_d, mask=m_d, other=0.0)
    b_u_j = tl.load(p_u + first_j * D + o, mask=m_cd, other=0.0)
    b_c = tl.load(p_c + first_i) - tl.load(p_c + first_j + o_c, mask=m_c, other=0.0)
    b_weight_i, b_weight_j = attention(b_e, b_u_i[None, :], b_u_j, b_c, ROOT)
    tl.store(p_weight_i + first_row + o_c, b_weight_i, mask=m_c)
    tl.store(p_weight_j + first_row + o_c, b_weight_j, mask=m_c)
    o_i, o_j = first_i.to(tl.int32), first_j.to(tl.int32) + o_c
    b_mask_i, b_mask_j = factors(o_i, o_j, classes * K, seed, layer, threshold, p_draw, SCALE, TIED, DROP, COMPUTE)
    b_v_i = tl.load(p_v + first_i * D + o_d, mask=m_d, other=0.0)
    b_v_j = tl.load(p_v + first_j * D + o, mask=m_cd, other=0.0)
    b_t = gate_sum(b_e, b_weight_i * b_mask_i, b_v_i[None, :], b_weight_j * b_mask_j, b_v_j)
    b_gamma = tl.load(p_gamma + o_d, mask=m_d, other=0.0)
    b_beta = tl.load(p_beta + o_d, mask=m_d, other=0.0)
    b_y = norm_gelu(b_t, b_gamma, b_beta, m_d[None, :], D)
    tl.store(p_e1 + first_row * D + o, b_y.to(p_e1.dtype.element_ty), mask=m_cd)
    if p_low is not None:
        tl.store(p_low + first_row * D + o, b_y.to(p_low.dtype.element_ty), mask=m_cd)


@triton.jit
def dropped_of_views(
    first_i,
    first_j,
    o_c,
    nodes,
    seed,
    layer,
    threshold,
    p_draw,  # (1,)
    TIED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Which tokens dropout takes out (BLOCK_V, BLOCK_C), of the views from first_i on and of columns o_c: bit 0 stands
    for that of i, bit 1 for that of j. All are drawn at once, each by one thread alone."""
    o_i = (first_i.to(tl.int32) + tl.arange(0, BLOCK_V))[:, None] + tl.zeros_like(o_c)[None, :]
    o_j = wrapped(first_j.to(tl.int32) + o_c, nodes)[None, :] + tl.zeros_like(o_i)
    draw = tl.load(p_draw).to(tl.uint32)
    b_i, b_j = dropped_tokens(o_i, o_j, seed, layer, threshold, draw, TIED)
    return b_i.to(tl.int32) + 2 * b_j.to(tl.int32)


@triton.jit
def factors_of_view(dropped, v, SCALE: tl.constexpr, COMPUTE: tl.constexpr):
    """What dropout multiplies the weights of view v's tokens with (BLOCK_C,) each: see dropped_of_views."""
    b_bits = tl.sum(tl.where((tl.arange(0, dropped.shape[0]) == v)[:, None], dropped, 0), axis=0)
    b_scale = tl.full(b_bits.shape, SCALE, COMPUTE)
    return tl.where((b_bits & 1) != 0, 0.0, b_scale), tl.where((b_bits & 2) != 0, 0.0, b_scale)


@triton.jit(do_not_specialize=[*TILE, *DROPOUT])
def gate_backward_kernel(
    p_u,  # (classes + reach, K, D)
    p_v,  # (classes + reach, K, D)
    p_gamma,  # (D,)
    p_e,  # (A, K, O, K, D)
    p_de1,  # (A, K, O, K, D)
    p_weight_i,  # (A, K, O, K)
    p_weight_j,  # (A, K, O, K)
    p_draw,  # (1,)
    p_de,  # (A, K, O, K, D) or None, may be de1
    p_rows_u,  # (A, K, blocks, D) or None, and with it all that follow
    p_rows_c,  # (A, K, blocks)
    p_rows_v,  # (A, K, blocks, D)
    p_columns_u,  # (A, chunks, O, K, D)
    p_columns_c,  # (A, chunks, O, K)
    p_columns_v,  # (A, chunks, O, K, D)
    p_dgamma,  # (programs, D)
    p_dbeta,  # (programs, D)
    A,
    K,
    O,
    first,
    offset,
    mirrored,
    classes,
    D: tl.constexpr,
    seed,
    layer,
    threshold,
    ROOT: tl.constexpr,
    SCALE: tl.constexpr,
    TIED: tl.constexpr,
    DROP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: a place (see tiles.py)."""
    a, chunk, block, o_c, o_d, m_c, m_d, m_cd = place_of(K, O, D, 0, BLOCK_C, BLOCK_V, BLOCK_D)
    _, first_j, _ = first_places(a, 0, K, O, first, offset)
    o = o_c[:, None] * D + o_d[None, :]
    b_v_j = tl.load(p_v + first_j * D + o, mask=m_cd, other=0.0)
    b_gamma = tl.load(p_gamma + o_d, mask=m_d, other=0.0)
    b_column_u = tl.zeros((BLOCK_C, BLOCK_D), dtype=COMPUTE)
    b_column_v = tl.zeros((BLOCK_C, BLOCK_D), dtype=COMPUTE)
    b_column_c = tl.zeros((BLOCK_C,), dtype=COMPUTE)
    b_dgamma = tl.zeros((BLOCK_D,), dtype=COMPUTE)
    b_dbeta = tl.zeros((BLOCK_D,), dtype=COMPUTE)
    b_mask_i = tl.full((BLOCK_C,), SCALE, COMPUTE)
    b_mask_j = b_mask_i
    if DROP:
        first_i, _, _ = first_places(a, chunk * BLOCK_V, K, O, first, offset)
        b_dropped = dropped_of_views(first_i, first_j, o_c, classes * K, seed, layer, threshold, p_draw, TIED, BLOCK_V)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        first_i, _, first_row = first_places(a, i, K, O, first, offset)
        b_weight_i = tl.load(p_weight_i + first_row + o_c, mask=m_c, other=0.0)
        b_weight_j = tl.load(p_weight_j + first_row + o_c, mask=m_c, other=0.0)
        if DROP:
            b_mask_i, b_mask_j = factors_of_view(b_dropped, i - chunk * BLOCK_V, SCALE, COMPUTE)
        b_masked_i, b_masked_j = b_weight_i * b_mask_i, b_weight_j * b_mask_j
        b_v_i = tl.load(p_v + first_i * D + o_d, mask=m_d, other=0.0)
        b_e = tl.load(p_e + first_row * D + o, mask=m_cd, other=0.0).to(COMPUTE)
        b_de1 = tl.load(p_de1 + first_row * D + o, mask=m_cd, other=0.0).to(COMPUTE)
        b_t = gate_sum(b_e, b_masked_i, b_v_i[None, :], b_masked_j, b_v_j)
        b_dt, b_normalized = norm_gelu_backward(b_t, b_gamma, b_de1, m_d[None, :], D)
        # v is 0 outside of the row, where dt has no meaning; columns past the last have de1 = 0, and so dt = 0
        b_dmasked_i = tl.sum(b_dt * b_v_i[None, :], axis=1)
        b_dmasked_j = tl.sum(b_dt * b_v_j, axis=1)
        b_dlogit = (b_dmasked_i * b_mask_i - b_dmasked_j * b_mask_j) * b_weight_i * b_weight_j * ROOT
        if p_rows_u is not None:
            b_du = b_dlogit[:, None] * b_e
            o_part = row_part(a, i, block, K, O, BLOCK_C)
            tl.store(p_rows_u + o_part * D + o_d, tl.sum(b_du, axis=0), mask=m_d)
            tl.store(p_rows_v + o_part * D + o_d, tl.sum(b_masked_i[:, None] * b_dt, axis=0), mask=m_d)
            tl.store(p_rows_c + o_part, tl.sum(b_dlogit, axis=0))
            b_column_u -= b_du
            b_column_v += b_masked_j[:, None] * b_dt
            b_column_c -= b_dlogit
            b_dgamma += tl.sum(b_de1 * b_normalized, axis=0)
            b_dbeta += tl.sum(b_de1, axis=0)
        if p_de is not None:
            b_u = tl.load(p_u + first_i * D + o_d, mask=m_d, other=0.0)[None, :]
            b_u -= tl.load(p_u + first_j * D + o, mask=m_cd, other=0.0)
            b_de = b_dt + b_dlogit[:, None] * b_u
            tl.store(p_de + first_row * D + o, b_de.to(p_de.dtype.element_ty), mask=m_cd)
    if p_rows_u is not None:
        o_column = column_part(a, chunk, o_c, 0, K, O, BLOCK_V)
        tl.store(p_columns_u + o_column[:, None] * D + o_d[None, :], b_column_u, mask=m_cd)
        tl.store(p_columns_v + o_column[:, None] * D + o_d[None, :], b_column_v, mask=m_cd)
        tl.store(p_columns_c + o_column, b_column_c, mask=m_c)
        o_part = tl.program_id(0).to(tl.int64) * D + o_d
        tl.store(p_dgamma + o_part, b_dgamma, mask=m_d)
        tl.store(p_dbeta + o_part, b_dbeta, mask=m_d)


# -- launchers


def _constants(inputs: GateInputs) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The numbers and constants that both kernels take."""
    numbers, constants = dropout_arguments(inputs.dropout, inputs.scale)
    gamma = inputs.norm.gamma
    return numbers, {"ROOT": len(gamma) ** -0.5, "COMPUTE": compute_type(gamma.dtype), **constants}


def forward(inputs: GateInputs, outputs: GateOutputs) -> None:
    """Passes a tile's edges through the gate.

    Args:
        inputs: the tile; dropout and its scale 1/(1-p); draw, the number of the pass (0-dim int64); the tokens u, v
            (classes + reach, K, D) and c (classes + reach, K, 1); the norm's gamma and beta (D,); the edges e (T, D).
        outputs: e1 (T, D); low, the same in the products' type, where it is given; the attention
            weights weight_i and weight_j = 1 - weight_i (T, 1), without dropout.
    """
    e, tokens = inputs.e, inputs.tokens
    pointers = (*tokens, *inputs.norm, e, *outputs, inputs.draw)
    numbers, constants = _constants(inputs)
    launch_places(gate_forward_kernel, row_places(inputs.tile, e.shape[1], GATE), pointers, numbers, **constants)


def backward(inputs: GateInputs, upstream: GateUpstream, gradients: GateGradients) -> None:
    """Passes the gradient of a tile's edges back through the gate.

    Args:
        inputs: as `forward` had them.
        upstream: de1 (T, D), and the attention weights (T, 1) that `forward` left.
        gradients: de (T, D), which may be de1, where it is given; and, where they are given, sums: du, dc and dv (as u,
            c and v) and dgamma and dbeta (D,), which are added to.
    """
    (tile, _, _, draw, tokens, norm, e), (de, sums) = inputs, gradients
    channels = e.shape[1]
    # No fewer values than threads: one that lay in two of them could be read after de has replaced it.
    _, columns = row_block(channels, GATE_BACKWARD)
    least = max(1, 32 * GATE_BACKWARD.warps(columns) // columns)
    places = row_places(tile, channels, GATE_BACKWARD, ENDS.block_views, least)
    parts, norms, added_to = [], [], [None] * 8
    if sums is not None:
        parts = [node_parts(places, width, norm.gamma) for width in (channels, 1, channels)]
        norms = [partials(norm.gamma, places.grid[0], channels) for _ in range(2)]
        added_to = [*(part.rows for part in parts), *(part.columns for part in parts), *norms]
    pointers = (tokens.u, tokens.v, norm.gamma, e, *upstream, draw, de, *added_to)
    numbers, constants = _constants(inputs)
    launch_places(gate_backward_kernel, places, pointers, numbers, **constants)
    if sums is not None:
        for part, into in zip(parts, (sums.du, sums.dc, sums.dv), strict=True):
            add_nodes(tile, part, into)
        for part, into in zip(norms, (sums.dgamma, sums.dbeta), strict=True):
            add_partials(part, into)
