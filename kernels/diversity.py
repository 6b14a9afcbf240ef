"""J_div of a tile of coefficients: sums of x = θ - ½ and of its squares, and the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import ENDS
from gcahng.kernels.launch import compute_type, on_device_of
from gcahng.kernels.tiles import TILE, Tile, add_nodes, cut, node_parts, place_of, places


@triton.jit(do_not_specialize=TILE)
def diversity_forward_kernel(
    p_theta,  # (A, K, O, K, D)
    p_rows,  # (A, K, blocks, D)
    p_columns,  # (A, chunks, O - mirrored, K, D)
    p_squares,  # (A, K, blocks, D)
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
    skip = mirrored * K
    b_directions = tl.where(o_c >= skip, 2.0, 1.0).to(COMPUTE)
    b_column = tl.zeros((BLOCK_C, BLOCK_D), dtype=COMPUTE)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        o_row = (a * K + i) * O * K + o_c
        b_x = tl.load(p_theta + o_row[:, None] * D + o_d[None, :], mask=m_cd, other=0.5) - 0.5
        b_column += b_x
        o_part = ((a * K + i) * tl.cdiv(O * K, BLOCK_C) + block) * D + o_d
        tl.store(p_rows + o_part, tl.sum(b_x, axis=0), mask=m_d)
        tl.store(p_squares + o_part, tl.sum(b_directions[:, None] * b_x * b_x, axis=0), mask=m_d)
    o_column = (a * tl.cdiv(K, BLOCK_V) + chunk) * (O * K - skip) + o_c - skip
    tl.store(p_columns + o_column[:, None] * D + o_d[None, :], b_column, mask=m_cd & (o_c >= skip)[:, None])


@triton.jit(do_not_specialize=TILE)
def diversity_backward_kernel(
    p_theta,  # (A, K, O, K, D)
    p_mean,  # (classes + reach, K, D)
    p_scale,  # (1,)
    p_dtheta,  # (A, K, O, K, D)
    K,
    O,
    first,
    offset,
    mirrored,
    D,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: a place (see tiles.py), BLOCK_D channels."""
    a, chunk, _, o_c, m_c = place_of(K, O, BLOCK_C, BLOCK_V)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_cd = m_c[:, None] & m_d[None, :]
    b_scale = tl.load(p_scale)
    b_both = (o_c >= mirrored * K)[:, None]
    o_j = (first + a + offset) * K + o_c
    b_mean_j = tl.load(p_mean + o_j[:, None] * D + o_d[None, :], mask=m_cd & b_both, other=0.0)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        o = ((a * K + i) * O * K + o_c)[:, None] * D + o_d[None, :]
        b_mean_i = tl.load(p_mean + ((first + a) * K + i) * D + o_d, mask=m_d, other=0.0)
        b_theta = tl.load(p_theta + o, mask=m_cd, other=0.0)
        b_away = b_theta - b_mean_i[None, :] + tl.where(b_both, b_theta - b_mean_j, 0.0)
        b_dtheta = tl.load(p_dtheta + o, mask=m_cd, other=0.0)
        tl.store(p_dtheta + o, b_dtheta + b_scale * b_away, mask=m_cd)


def forward(tile: Sequence[int], theta: Tensor, sum: Tensor, square: Tensor) -> None:
    """θ (T, D) → sum (classes + reach, K, D) += Σ x at both ends of mirrored edges, x = θ - ½; square, of the same
    shape, += Σ x² at the anchors, twice where an edge stands for both directions."""
    tile, config, channels = Tile(*tile), ENDS, theta.shape[1]
    by = cut(tile, config.block_columns, config.block_views)
    sums = node_parts(tile, by, channels, theta, skip=tile.mirrored)
    squares = node_parts(tile, by, channels, theta, skip=tile.O)
    with on_device_of(theta):
        diversity_forward_kernel[places(tile, by, channels, config.block_channels)](
            theta,
            sums.rows,
            sums.columns,
            squares.rows,
            tile.K,
            tile.O,
            tile.mirrored,
            channels,
            COMPUTE=compute_type(theta.dtype),
            BLOCK_C=by.columns,
            BLOCK_V=by.views,
            BLOCK_D=config.block_channels,
            num_warps=config.num_warps,
        )
    add_nodes(tile, sums, sum)
    add_nodes(tile, squares, square)


def backward(tile: Sequence[int], theta: Tensor, mean: Tensor, scale: Tensor, dtheta: Tensor) -> None:
    """dtheta (T, D) += scale (θ - mean_i), and scale (θ - mean_j) where an edge stands for both directions. θ (T, D),
    mean (classes + reach, K, D), scale (0-dim)."""
    tile, config, channels = Tile(*tile), ENDS, theta.shape[1]
    by = cut(tile, config.block_columns, config.block_views)
    with on_device_of(theta):
        diversity_backward_kernel[places(tile, by, channels, config.block_channels)](
            theta,
            mean,
            scale,
            dtheta,
            tile.K,
            tile.O,
            tile.first,
            tile.offset,
            tile.mirrored,
            channels,
            BLOCK_C=by.columns,
            BLOCK_V=by.views,
            BLOCK_D=config.block_channels,
            num_warps=config.num_warps,
        )
