"""Gate: an edge's attention to its two tokens, residual and LayerNorm(GELU(·)), and its backward."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels._gate import DROPOUT, attention, dropout_arguments, factors, gate_sum
from gcahng.kernels.configs import ENDS, GATE, GATE_BACKWARD
from gcahng.kernels.functions import norm_gelu, norm_gelu_backward
from gcahng.kernels.launch import compute_type, on_device_of, row_block
from gcahng.kernels.sums import add_partials, partials
from gcahng.kernels.tiles import TILE, NodeParts, Tile, add_nodes, cut, node_parts, place_of


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
    p_p,  # (A, K, O, K)
    p_q,  # (A, K, O, K)
    p_draw,  # (1,)
    K,
    O,
    first,
    offset,
    classes,
    D,
    seed,
    layer,
    threshold,
    ROOT: tl.constexpr,
    SCALE: tl.constexpr,
    TIED: tl.constexpr,
    DROP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: an anchor and BLOCK_C of its columns."""
    a, i, _, o_c, m_c = place_of(K, O, BLOCK_C, 1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_cd = m_c[:, None] & m_d[None, :]
    o_i = (first + a) * K + i
    o_j = (first + a + offset) * K + o_c
    o_row = (a * K + i) * O * K + o_c
    o, o_node = o_row[:, None] * D + o_d[None, :], o_j[:, None] * D + o_d[None, :]
    b_e = tl.load(p_e + o, mask=m_cd, other=0.0)
    b_u_i = tl.load(p_u + o_i * D + o_d, mask=m_d, other=0.0)
    b_u_j = tl.load(p_u + o_node, mask=m_cd, other=0.0)
    b_c = tl.load(p_c + o_i) - tl.load(p_c + o_j, mask=m_c, other=0.0)
    b_p, b_q = attention(b_e, b_u_i[None, :], b_u_j, b_c, ROOT)
    tl.store(p_p + o_row, b_p, mask=m_c)
    tl.store(p_q + o_row, b_q, mask=m_c)
    b_keep_i, b_keep_j = factors(o_i, o_j, classes * K, seed, layer, threshold, p_draw, SCALE, TIED, DROP, COMPUTE)
    b_v_i = tl.load(p_v + o_i * D + o_d, mask=m_d, other=0.0)
    b_v_j = tl.load(p_v + o_node, mask=m_cd, other=0.0)
    b_t = gate_sum(b_e, b_p * b_keep_i, b_v_i[None, :], b_q * b_keep_j, b_v_j)
    b_gamma = tl.load(p_gamma + o_d, mask=m_d, other=0.0)
    b_beta = tl.load(p_beta + o_d, mask=m_d, other=0.0)
    b_y = norm_gelu(b_t, b_gamma, b_beta, m_d[None, :], D)
    tl.store(p_e1 + o, b_y, mask=m_cd)
    if p_low is not None:
        tl.store(p_low + o, b_y.to(p_low.dtype.element_ty), mask=m_cd)


@triton.jit(do_not_specialize=[*TILE, *DROPOUT])
def gate_backward_kernel(
    p_u,  # (classes + reach, K, D)
    p_v,  # (classes + reach, K, D)
    p_gamma,  # (D,)
    p_e,  # (A, K, O, K, D)
    p_de1,  # (A, K, O, K, D)
    p_p,  # (A, K, O, K)
    p_q,  # (A, K, O, K)
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
    K,
    O,
    first,
    offset,
    classes,
    D,
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
    a, chunk, block, o_c, m_c = place_of(K, O, BLOCK_C, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_cd = m_c[:, None] & m_d[None, :]
    o_j = (first + a + offset) * K + o_c
    o_node = o_j[:, None] * D + o_d[None, :]
    b_v_j = tl.load(p_v + o_node, mask=m_cd, other=0.0)
    b_gamma = tl.load(p_gamma + o_d, mask=m_d, other=0.0)
    b_column_u = tl.zeros((BLOCK_C, BLOCK_D), dtype=COMPUTE)
    b_column_v = tl.zeros((BLOCK_C, BLOCK_D), dtype=COMPUTE)
    b_column_c = tl.zeros((BLOCK_C,), dtype=COMPUTE)
    b_dgamma = tl.zeros((BLOCK_C, BLOCK_D), dtype=COMPUTE)
    b_dbeta = tl.zeros((BLOCK_C, BLOCK_D), dtype=COMPUTE)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        o_i = (first + a) * K + i
        o_row = (a * K + i) * O * K + o_c
        o = o_row[:, None] * D + o_d[None, :]
        b_p = tl.load(p_p + o_row, mask=m_c, other=0.0)
        b_q = tl.load(p_q + o_row, mask=m_c, other=0.0)
        b_keep_i, b_keep_j = factors(o_i, o_j, classes * K, seed, layer, threshold, p_draw, SCALE, TIED, DROP, COMPUTE)
        b_w_i, b_w_j = b_p * b_keep_i, b_q * b_keep_j
        b_v_i = tl.load(p_v + o_i * D + o_d, mask=m_d, other=0.0)
        b_e = tl.load(p_e + o, mask=m_cd, other=0.0)
        b_de1 = tl.load(p_de1 + o, mask=m_cd, other=0.0)
        b_t = gate_sum(b_e, b_w_i, b_v_i[None, :], b_w_j, b_v_j)
        b_dt, b_normalised = norm_gelu_backward(b_t, b_gamma, b_de1, m_d[None, :], D)
        # v is 0 outside of the row, where dt has no meaning; columns past the last have de1 = 0, and so dt = 0
        b_dp = tl.sum(b_dt * b_v_i[None, :], axis=1)
        b_dq = tl.sum(b_dt * b_v_j, axis=1)
        b_dlogit = (b_dp * b_keep_i - b_dq * b_keep_j) * b_p * b_q * ROOT
        if p_rows_u is not None:
            b_du = b_dlogit[:, None] * b_e
            o_part = (a * K + i) * tl.cdiv(O * K, BLOCK_C) + block
            tl.store(p_rows_u + o_part * D + o_d, tl.sum(b_du, axis=0), mask=m_d)
            tl.store(p_rows_v + o_part * D + o_d, tl.sum(b_w_i[:, None] * b_dt, axis=0), mask=m_d)
            tl.store(p_rows_c + o_part, tl.sum(b_dlogit, axis=0))
            b_column_u -= b_du
            b_column_v += b_w_j[:, None] * b_dt
            b_column_c -= b_dlogit
            b_dgamma += b_de1 * b_normalised
            b_dbeta += b_de1
        if p_de is not None:
            b_u = tl.load(p_u + o_i * D + o_d, mask=m_d, other=0.0)[None, :]
            b_u -= tl.load(p_u + o_node, mask=m_cd, other=0.0)
            tl.store(p_de + o, b_dt + b_dlogit[:, None] * b_u, mask=m_cd)
    if p_rows_u is not None:
        o_column = (a * tl.cdiv(K, BLOCK_V) + chunk) * O * K + o_c
        tl.store(p_columns_u + o_column[:, None] * D + o_d[None, :], b_column_u, mask=m_cd)
        tl.store(p_columns_v + o_column[:, None] * D + o_d[None, :], b_column_v, mask=m_cd)
        tl.store(p_columns_c + o_column, b_column_c, mask=m_c)
        o_part = tl.program_id(0).to(tl.int64) * D + o_d
        tl.store(p_dgamma + o_part, tl.sum(b_dgamma, axis=0), mask=m_d)
        tl.store(p_dbeta + o_part, tl.sum(b_dbeta, axis=0), mask=m_d)


def forward(
    tile: Sequence[int],
    dropout: Sequence[int],
    scale: float,
    draw: Tensor,
    u: Tensor,
    c: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    e: Tensor,
    e1: Tensor,
    low: Tensor | None,
    p: Tensor,
    q: Tensor,
) -> None:
    """e (T, D); u, v (classes + reach, K, D), c (classes + reach, K, 1) → e1, low (T, D); p and 1 - p (T, 1)."""
    tile, config, channels = Tile(*tile), GATE, e.shape[1]
    columns, block_d = row_block(channels, config)
    by = cut(tile, columns, 1)
    numbers, constants = dropout_arguments(dropout, scale)
    with on_device_of(e):
        gate_forward_kernel[(tile.A * by.chunks * by.blocks,)](
            u,
            c,
            v,
            gamma,
            beta,
            e,
            e1,
            low,
            p,
            q,
            draw,
            tile.K,
            tile.O,
            tile.first,
            tile.offset,
            tile.classes,
            channels,
            *numbers,
            ROOT=channels**-0.5,
            **constants,
            COMPUTE=compute_type(e.dtype),
            BLOCK_C=by.columns,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
        )


def backward(
    tile: Sequence[int],
    dropout: Sequence[int],
    scale: float,
    draw: Tensor,
    u: Tensor,
    c: Tensor,
    v: Tensor,
    gamma: Tensor,
    e: Tensor,
    de1: Tensor,
    p: Tensor,
    q: Tensor,
    de: Tensor | None,
    du: Tensor | None,
    dc: Tensor | None,
    dv: Tensor | None,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
) -> None:
    """de1 (T, D) → de (T, D), which may be de1; adds to du, dc, dv (as u, c, v) and dgamma, dbeta (D): all of them, or
    none."""
    tile, config, channels = Tile(*tile), GATE_BACKWARD, e.shape[1]
    columns, block_d = row_block(channels, config)
    # No fewer values than threads: one that lay in two of them could be read after de has replaced it.
    by = cut(tile, columns, ENDS.block_views, least=max(1, 32 * config.num_warps // block_d))
    programs = tile.A * by.chunks * by.blocks
    parts: list[NodeParts] = []
    places = [None] * 8
    if du is not None:
        parts = [node_parts(tile, by, width, e) for width in (channels, 1, channels)]
        norms = [partials(e, programs, channels) for _ in range(2)]
        places = [*(part.rows for part in parts), *(part.columns for part in parts), *norms]
    numbers, constants = dropout_arguments(dropout, scale)
    with on_device_of(e):
        gate_backward_kernel[(programs,)](
            u,
            v,
            gamma,
            e,
            de1,
            p,
            q,
            draw,
            de,
            *places,
            tile.K,
            tile.O,
            tile.first,
            tile.offset,
            tile.classes,
            channels,
            *numbers,
            ROOT=channels**-0.5,
            **constants,
            COMPUTE=compute_type(e.dtype),
            BLOCK_C=by.columns,
            BLOCK_V=by.views,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
        )
    if du is not None:
        for part, into in zip(parts, (du, dc, dv), strict=True):
            add_nodes(tile, part, into)
        for part, into in zip(norms, (dgamma, dbeta), strict=True):
            add_partials(part, into)
