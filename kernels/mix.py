"""Mixing: coefficients and embeddings to negatives, and back (see gcahng/engine/mixing.py and kernels/_mixing.py)."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels._mixing import SMALL, mix_of, shares_of
from gcahng.kernels.configs import ENDS, MIX
from gcahng.kernels.launch import on_device_of, row_block
from gcahng.kernels.tiles import TILE, NodeParts, Tile, add_nodes, cut, node_parts, place_of


@triton.jit(do_not_specialize=["mixes", *TILE])
def mix_forward_kernel(
    p_z,  # (classes + reach, K, D)
    p_d_plus,  # (classes + reach, K)
    p_kappa,  # (K, K)
    p_pull,  # (1,)
    p_theta,  # (A, K, O, K, D)
    p_negatives,  # (mixes, D) or None
    p_logits,  # (mixes,) or None
    p_squares,  # (mixes,) or None
    mixes,
    A,
    K,
    O,
    first,
    offset,
    mirrored,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R mixes."""
    o_m = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_m = o_m < mixes
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_md = m_m[:, None] & m_d[None, :]
    m_forward, o_view, o_anchor, o_negative, o_edge, o_step, m_own = mix_of(o_m, A, K, O, first, offset, mirrored)
    pull = tl.load(p_pull)
    b_a = tl.load(p_z + o_anchor[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
    b_d_plus = tl.load(p_d_plus + o_anchor, mask=m_m, other=0.0)
    b_n = b_a
    for v in range(K):
        b_b = tl.load(p_z + (o_negative + v)[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
        b_theta = tl.load(p_theta + (o_edge + v * o_step)[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
        b_kappa = tl.load(p_kappa + o_view * K + v, mask=m_m, other=0.0)
        m_positive = m_forward & m_own & ((o_view + 1) % K == v)
        b_ratio, _, _ = shares_of(b_a, b_b, b_d_plus, m_positive, m_d)
        b_rest = (1.0 - b_ratio) * pull
        b_n += b_kappa[:, None] * (b_b - b_a) * (b_ratio[:, None] + b_rest[:, None] * b_theta)
    if p_negatives is not None:
        tl.store(p_negatives + o_m.to(tl.int64)[:, None] * D + o_d[None, :], b_n, mask=m_md)
    if p_logits is not None:
        tl.store(p_logits + o_m, tl.sum(b_a * b_n, axis=1), mask=m_m)
        tl.store(p_squares + o_m, tl.sum(b_n * b_n, axis=1), mask=m_m)


@triton.jit(do_not_specialize=TILE)
def mix_backward_theta_kernel(
    p_z,  # (classes + reach, K, D)
    p_d_plus,  # (classes + reach, K)
    p_kappa,  # (K, K)
    p_pull,  # (1,)
    p_dn,  # (mixes, D)
    p_dtheta,  # (A, K, O, K, D)
    A,
    K,
    O,
    first,
    offset,
    mirrored,
    D,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: an anchor and BLOCK_C of its columns, both directions."""
    a, i, _, o_c, m_c = place_of(K, O, BLOCK_C, 1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_cd = m_c[:, None] & m_d[None, :]
    o_o, o_v = o_c // K, o_c % K
    o_i = (first + a) * K + i
    o_j = (first + a + offset) * K + o_c
    pull = tl.load(p_pull)
    b_a = tl.load(p_z + o_i * D + o_d, mask=m_d, other=0.0)[None, :]
    b_b = tl.load(p_z + o_j[:, None] * D + o_d[None, :], mask=m_cd, other=0.0)
    b_difference = b_b - b_a

    m_positive = (offset + o_o == 0) & (o_v == (i + 1) % K)
    b_ratio, _, _ = shares_of(b_a, b_b, tl.load(p_d_plus + o_i), m_positive, m_d)
    b_scale = (1.0 - b_ratio) * pull * tl.load(p_kappa + i * K + o_v, mask=m_c, other=0.0)
    o_m = (a * K + i) * O + o_o
    b_dn = tl.load(p_dn + o_m[:, None] * D + o_d[None, :], mask=m_cd, other=0.0)
    b_dtheta = b_scale[:, None] * b_dn * b_difference

    m_back = m_c & (o_o >= mirrored)
    b_d_plus = tl.load(p_d_plus + o_j, mask=m_back, other=0.0)
    b_ratio, _, _ = shares_of(b_b, b_a, b_d_plus, o_c < 0, m_d)
    b_scale = (1.0 - b_ratio) * pull * tl.load(p_kappa + o_v * K + i, mask=m_back, other=0.0)
    o_m = A * K * O + a * (O - mirrored) * K + o_c - mirrored * K
    b_dn = tl.load(p_dn + o_m[:, None] * D + o_d[None, :], mask=m_back[:, None] & m_d[None, :], other=0.0)
    b_dtheta -= b_scale[:, None] * b_dn * b_difference
    tl.store(p_dtheta + ((a * K + i) * O * K + o_c)[:, None] * D + o_d[None, :], b_dtheta, mask=m_cd)


@triton.jit(do_not_specialize=["mixes", *TILE])
def mix_backward_shares_kernel(
    p_z,  # (classes + reach, K, D)
    p_d_plus,  # (classes + reach, K)
    p_kappa,  # (K, K)
    p_pull,  # (1,)
    p_theta,  # (A, K, O, K, D)
    p_dlogits,  # (mixes,)
    p_negatives,  # (mixes, D)
    p_ratio,  # (2, A, K, O, K): of each edge, forward and back
    p_along,  # (2, A, K, O, K): what the gradient of a difference has along the difference, through d⁻
    p_positive,  # (mixes,): gradients of d⁺
    mixes,
    A,
    K,
    O,
    first,
    offset,
    mirrored,
    D,
    SQUARE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R mixes."""
    o_m = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    _, o_view, o_anchor, o_negative, o_edge, o_step, m_own = mix_of(o_m, A, K, O, first, offset, mirrored)
    m_m = (o_m < mixes) & (m_own == 0)
    m_md = m_m[:, None] & m_d[None, :]
    pull = tl.load(p_pull)
    b_a = tl.load(p_z + o_anchor[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
    b_d_plus = tl.load(p_d_plus + o_anchor, mask=m_m, other=0.0)
    b_n = b_a
    for v in range(K):
        b_b = tl.load(p_z + (o_negative + v)[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
        b_theta = tl.load(p_theta + (o_edge + v * o_step)[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
        b_kappa = tl.load(p_kappa + o_view * K + v, mask=m_m, other=0.0)
        b_ratio, _, _ = shares_of(b_a, b_b, b_d_plus, m_own, m_d)
        b_rest = (1.0 - b_ratio) * pull
        b_n += b_kappa[:, None] * (b_b - b_a) * (b_ratio[:, None] + b_rest[:, None] * b_theta)
    tl.store(p_negatives + o_m.to(tl.int64)[:, None] * D + o_d[None, :], b_n, mask=m_md)
    b_dn = tl.load(p_dlogits + o_m, mask=m_m, other=0.0)[:, None] * b_a + SQUARE * b_n
    b_positive = tl.zeros_like(b_d_plus)
    o_first = o_edge + tl.where(o_m < A * K * O, 0, 1) * (A.to(tl.int64) * K * O * K)
    for v in range(K):
        b_b = tl.load(p_z + (o_negative + v)[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
        b_theta = tl.load(p_theta + (o_edge + v * o_step)[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
        b_kappa = tl.load(p_kappa + o_view * K + v, mask=m_m, other=0.0)
        b_ratio, b_away, m_easy = shares_of(b_a, b_b, b_d_plus, m_own, m_d)
        b_d_ratio = b_kappa * tl.sum(b_dn * (b_b - b_a) * (1.0 - pull * b_theta), axis=1)
        b_d_ratio = tl.where(m_easy, b_d_ratio, 0.0)
        b_positive += b_d_ratio / b_away
        tl.store(p_ratio + o_first + v * o_step, b_ratio, mask=m_m)
        tl.store(p_along + o_first + v * o_step, -b_d_ratio * b_ratio / (b_away * b_away), mask=m_m)
    tl.store(p_positive + o_m, tl.where(m_own, 0.0, b_positive), mask=o_m < mixes)


@triton.jit(do_not_specialize=TILE)
def mix_backward_z_kernel(
    p_z,  # (classes + reach, K, D)
    p_kappa,  # (K, K)
    p_pull,  # (1,)
    p_theta,  # (A, K, O, K, D)
    p_dlogits,  # (mixes,)
    p_negatives,  # (mixes, D)
    p_ratio,  # (2, A, K, O, K)
    p_along,  # (2, A, K, O, K)
    p_rows,  # (A, K, blocks, D)
    p_columns,  # (A, chunks, O, K, D)
    A,
    K,
    O,
    first,
    offset,
    mirrored,
    D,
    SQUARE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: a place (see tiles.py), BLOCK_D channels, both directions."""
    a, chunk, block, o_c, m_c = place_of(K, O, BLOCK_C, BLOCK_V)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_cd = m_c[:, None] & m_d[None, :]
    o_o, o_v = o_c // K, o_c % K
    m_out = m_c & (offset + o_o != 0)
    m_back = m_out & (o_o >= mirrored)
    pull = tl.load(p_pull)
    o_j = (first + a + offset) * K + o_c
    b_b = tl.load(p_z + o_j[:, None] * D + o_d[None, :], mask=m_cd, other=0.0)

    o_m = A * K * O + a * (O - mirrored) * K + o_c - mirrored * K
    b_g = tl.load(p_dlogits + o_m, mask=m_back, other=0.0)
    b_n = tl.load(p_negatives + o_m[:, None] * D + o_d[None, :], mask=m_back[:, None] & m_d[None, :], other=0.0)
    b_dn_back = b_g[:, None] * b_b + SQUARE * b_n
    b_column = tl.where(chunk == 0, b_dn_back + b_g[:, None] * b_n, 0.0)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        o_row = (a * K + i) * O * K + o_c
        o_m = (a * K + i) * O + o_o
        b_a = tl.load(p_z + ((first + a) * K + i) * D + o_d, mask=m_d, other=0.0)[None, :]
        b_difference = b_b - b_a
        b_theta = tl.load(p_theta + o_row[:, None] * D + o_d[None, :], mask=m_cd, other=0.0)
        b_g = tl.load(p_dlogits + o_m, mask=m_out, other=0.0)
        b_n = tl.load(p_negatives + o_m[:, None] * D + o_d[None, :], mask=m_out[:, None] & m_d[None, :], other=0.0)
        b_dn = b_g[:, None] * b_a + SQUARE * b_n

        b_ratio = tl.load(p_ratio + o_row, mask=m_out, other=0.0)
        b_along = tl.load(p_along + o_row, mask=m_out, other=0.0)
        b_kappa = tl.load(p_kappa + i * K + o_v, mask=m_c, other=0.0)
        b_share = b_ratio[:, None] + ((1.0 - b_ratio) * pull)[:, None] * b_theta
        b_d = b_kappa[:, None] * b_dn * b_share + b_along[:, None] * (b_difference - SMALL)

        o_row += A.to(tl.int64) * K * O * K
        b_ratio = tl.load(p_ratio + o_row, mask=m_back, other=0.0)
        b_along = tl.load(p_along + o_row, mask=m_back, other=0.0)
        b_kappa = tl.load(p_kappa + o_v * K + i, mask=m_c, other=0.0)
        b_share = b_ratio[:, None] + ((1.0 - b_ratio) * pull)[:, None] * b_theta
        b_d -= b_kappa[:, None] * b_dn_back * b_share + b_along[:, None] * (-b_difference - SMALL)

        b_column += b_d
        b_row = tl.where((o_v == 0)[:, None], b_dn + b_g[:, None] * b_n, 0.0) - b_d
        o_part = (a * K + i) * tl.cdiv(O * K, BLOCK_C) + block
        tl.store(p_rows + o_part * D + o_d, tl.sum(b_row, axis=0), mask=m_d)
    o_column = (a * tl.cdiv(K, BLOCK_V) + chunk) * O * K + o_c
    tl.store(p_columns + o_column[:, None] * D + o_d[None, :], b_column, mask=m_cd)


def forward(
    tile: Sequence[int],
    z: Tensor,
    d_plus: Tensor,
    kappa: Tensor,
    pull: Tensor,
    theta: Tensor,
    negatives: Tensor | None,
    logits: Tensor | None,
    squares: Tensor | None,
) -> None:
    """theta (T, D); z (classes + reach, K, D), d_plus (classes + reach, K, 1), kappa (K, K), pull (0-dim) → negatives N
    (mixes, D), logits a·N and squares ‖N‖² (mixes,), these two together."""
    tile, channels = Tile(*tile), z.shape[-1]
    rows, block_d = row_block(channels, MIX)
    with on_device_of(z):
        mix_forward_kernel[(triton.cdiv(tile.mixes, rows),)](
            z,
            d_plus,
            kappa,
            pull,
            theta,
            negatives,
            logits,
            squares,
            tile.mixes,
            *tile[:6],
            channels,
            BLOCK_R=rows,
            BLOCK_D=block_d,
            num_warps=MIX.num_warps,
        )


def backward_theta(
    tile: Sequence[int], z: Tensor, d_plus: Tensor, kappa: Tensor, pull: Tensor, dn: Tensor, dtheta: Tensor
) -> None:
    """dn (mixes, D) → dtheta (T, D), both directions of an edge together."""
    tile, channels = Tile(*tile), z.shape[-1]
    columns, block_d = row_block(channels, MIX)
    by = cut(tile, columns, 1)
    with on_device_of(z):
        mix_backward_theta_kernel[(tile.A * by.chunks * by.blocks,)](
            z,
            d_plus,
            kappa,
            pull,
            dn,
            dtheta,
            *tile[:6],
            channels,
            BLOCK_C=by.columns,
            BLOCK_D=block_d,
            num_warps=MIX.num_warps,
        )


def backward_z(
    tile: Sequence[int],
    z: Tensor,
    d_plus: Tensor,
    kappa: Tensor,
    pull: Tensor,
    theta: Tensor,
    dlogits: Tensor,
    square: float,
    dz: Tensor,
    d_d_plus: Tensor,
) -> None:
    """dlogits (mixes,) and the weight of ‖N‖² → adds to dz and d_d_plus (as z and d_plus); a class's mixes with itself
    are left out."""
    tile, channels = Tile(*tile), z.shape[-1]
    rows, block_d = row_block(channels, MIX)
    negatives, positive = z.new_empty(tile.mixes, channels), z.new_empty(tile.mixes)
    ratio, along = z.new_empty(2, tile.rows), z.new_empty(2, tile.rows)
    by = cut(tile, ENDS.block_columns, ENDS.block_views)
    parts = node_parts(tile, by, channels, z)
    with on_device_of(z):
        mix_backward_shares_kernel[(triton.cdiv(tile.mixes, rows),)](
            z,
            d_plus,
            kappa,
            pull,
            theta,
            dlogits,
            negatives,
            ratio,
            along,
            positive,
            tile.mixes,
            *tile[:6],
            channels,
            SQUARE=square,
            BLOCK_R=rows,
            BLOCK_D=block_d,
            num_warps=MIX.num_warps,
        )
        mix_backward_z_kernel[(tile.A * by.chunks * by.blocks, triton.cdiv(channels, ENDS.block_channels))](
            z,
            kappa,
            pull,
            theta,
            dlogits,
            negatives,
            ratio,
            along,
            *parts[:2],
            *tile[:6],
            channels,
            SQUARE=square,
            BLOCK_C=by.columns,
            BLOCK_V=by.views,
            BLOCK_D=ENDS.block_channels,
            num_warps=ENDS.num_warps,
        )
    add_nodes(tile, parts, dz)
    ahead = tile.A * tile.K * tile.O
    rows_of, columns_of = positive[:ahead], positive[ahead:]
    back = columns_of.view(tile.A, 1, tile.O - tile.mirrored, tile.K, 1)
    add_nodes(tile, NodeParts(rows_of.view(tile.A, tile.K, tile.O, 1), back, tile.mirrored), d_d_plus)
