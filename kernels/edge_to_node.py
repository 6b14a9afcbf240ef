"""Edge to node: S_i = Σ_j GELU(p_ij + b) from the products p, at both ends of edges, and its backward."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import ENDS
from gcahng.kernels.functions import gelu, gelu_slope, normal_cdf
from gcahng.kernels.launch import compute_type, on_device_of
from gcahng.kernels.sums import add_partials, partials
from gcahng.kernels.tiles import TILE, Tile, add_nodes, cut, node_parts, place_of, places


@triton.jit(do_not_specialize=TILE)
def edge_to_node_forward_kernel(
    p_p,  # (A, K, O, K, D)
    p_bias,  # (D,)
    p_rows,  # (A, K, blocks, D)
    p_columns,  # (A, chunks, O - mirrored, K, D)
    K,
    O,
    mirrored,
    D,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: a place (see tiles.py), BLOCK_D channels."""
    a, chunk, block, o_c, m_c = place_of(K, O, BLOCK_C, BLOCK_V)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_cd = m_c[:, None] & m_d[None, :]
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
    b_column = tl.zeros((BLOCK_C, BLOCK_D), dtype=COMPUTE)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        o_row = (a * K + i) * O * K + o_c
        b_p = tl.load(p_p + o_row[:, None] * D + o_d[None, :], mask=m_cd, other=0.0).to(COMPUTE)
        b_g = tl.where(m_cd, gelu(b_p + b_bias[None, :]), 0.0)
        b_column += b_g
        o_part = (a * K + i) * tl.cdiv(O * K, BLOCK_C) + block
        tl.store(p_rows + o_part * D + o_d, tl.sum(b_g, axis=0), mask=m_d)
    skip = mirrored * K
    o_column = (a * tl.cdiv(K, BLOCK_V) + chunk) * (O * K - skip) + o_c - skip
    tl.store(p_columns + o_column[:, None] * D + o_d[None, :], b_column, mask=m_cd & (o_c >= skip)[:, None])


@triton.jit(do_not_specialize=TILE)
def edge_to_node_backward_kernel(
    p_p,  # (A, K, O, K, D)
    p_bias,  # (D,)
    p_ds,  # (classes + reach, K, D)
    p_dp,  # (A, K, O, K, D), may be p
    p_part,  # (programs, D) or None
    K,
    O,
    first,
    offset,
    mirrored,
    D,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: a place (see tiles.py), BLOCK_D channels."""
    a, chunk, block, o_c, m_c = place_of(K, O, BLOCK_C, BLOCK_V)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_cd = m_c[:, None] & m_d[None, :]
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
    o_j = (first + a + offset) * K + o_c
    m_back = m_cd & (o_c >= mirrored * K)[:, None]
    b_ds_j = tl.load(p_ds + o_j[:, None] * D + o_d[None, :], mask=m_back, other=0.0)
    b_sum = tl.zeros((BLOCK_D,), dtype=COMPUTE)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        o_row = (a * K + i) * O * K + o_c
        b_ds_i = tl.load(p_ds + ((first + a) * K + i) * D + o_d, mask=m_d, other=0.0)
        b_x = tl.load(p_p + o_row[:, None] * D + o_d[None, :], mask=m_cd, other=0.0).to(COMPUTE) + b_bias[None, :]
        b_dp = (b_ds_i[None, :] + b_ds_j) * gelu_slope(b_x, normal_cdf(b_x))
        tl.store(p_dp + o_row[:, None] * D + o_d[None, :], b_dp.to(p_dp.dtype.element_ty), mask=m_cd)
        b_sum += tl.sum(tl.where(m_cd, b_dp, 0.0), axis=0)
    if p_part is not None:
        tl.store(p_part + tl.program_id(0).to(tl.int64) * D + o_d, b_sum, mask=m_d)


def forward(tile: Sequence[int], p: Tensor, b: Tensor, sum: Tensor) -> None:
    """p (T, D) → sum (classes + reach, K, D) += Σ GELU(p + b), both ends of mirrored edges."""
    tile, config, channels = Tile(*tile), ENDS, p.shape[1]
    by = cut(tile, config.block_columns, config.block_views)
    parts = node_parts(tile, by, channels, b, skip=tile.mirrored)
    with on_device_of(p):
        edge_to_node_forward_kernel[places(tile, by, channels, config.block_channels)](
            p,
            b,
            parts.rows,
            parts.columns,
            tile.K,
            tile.O,
            tile.mirrored,
            channels,
            COMPUTE=compute_type(b.dtype),
            BLOCK_C=by.columns,
            BLOCK_V=by.views,
            BLOCK_D=config.block_channels,
            num_warps=config.num_warps,
        )
    add_nodes(tile, parts, sum)


def backward(tile: Sequence[int], p: Tensor, b: Tensor, ds: Tensor, dp: Tensor, db: Tensor | None) -> None:
    """ds, the gradient of S (classes + reach, K, D) → dp (T, D), which may be p; db (D) += Σ dp."""
    tile, config, channels = Tile(*tile), ENDS, p.shape[1]
    by = cut(tile, config.block_columns, config.block_views)
    grid = places(tile, by, channels, config.block_channels)
    part = None if db is None else partials(b, grid[0], channels)
    with on_device_of(p):
        edge_to_node_backward_kernel[grid](
            p,
            b,
            ds,
            dp,
            part,
            tile.K,
            tile.O,
            tile.first,
            tile.offset,
            tile.mirrored,
            channels,
            COMPUTE=compute_type(b.dtype),
            BLOCK_C=by.columns,
            BLOCK_V=by.views,
            BLOCK_D=config.block_channels,
            num_warps=config.num_warps,
        )
    if db is not None:
        add_partials(part, db)
