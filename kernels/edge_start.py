"""Edge start: e_ij = x_i ∘ x_j, and its backward, two node sums."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import EDGE_START, ENDS
from gcahng.kernels.launch import compute_type, on_device_of
from gcahng.kernels.tiles import TILE, Tile, add_nodes, cut, node_parts, place_of, places


@triton.jit(do_not_specialize=["K", "J", "first", "offset"])
def edge_start_forward_kernel(
    p_x,  # (classes + reach, K, D)
    p_e,  # (A, K, J, D) or None
    p_low,  # (A, K, J, D) or None
    K,
    J,
    first,
    offset,
    D,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one node of the tile's anchors, BLOCK_J of the J it meets, BLOCK_D of the channels."""
    blocks = tl.cdiv(J, BLOCK_J)
    i = (tl.program_id(0) // blocks).to(tl.int64)
    o_j = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_jd = (o_j < J)[:, None] & m_d[None, :]
    o_column = (first + i // K + offset) * K + o_j
    b_x_i = tl.load(p_x + (first * K + i) * D + o_d, mask=m_d, other=0.0)
    b_x_j = tl.load(p_x + o_column[:, None] * D + o_d[None, :], mask=m_jd, other=0.0)
    b_e = b_x_i[None, :] * b_x_j
    o = (i * J + o_j)[:, None] * D + o_d[None, :]
    if p_e is not None:
        tl.store(p_e + o, b_e, mask=m_jd)
    if p_low is not None:
        tl.store(p_low + o, b_e.to(p_low.dtype.element_ty), mask=m_jd)


@triton.jit(do_not_specialize=TILE)
def edge_start_backward_kernel(
    p_x,  # (classes + reach, K, D)
    p_de,  # (A, K, O, K, D)
    p_rows,  # (A, K, blocks, D)
    p_columns,  # (A, chunks, O, K, D)
    K,
    O,
    first,
    offset,
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
    o_j = (first + a + offset) * K + o_c
    b_x_j = tl.load(p_x + o_j[:, None] * D + o_d[None, :], mask=m_cd, other=0.0)
    b_column = tl.zeros((BLOCK_C, BLOCK_D), dtype=COMPUTE)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        o_row = (a * K + i) * O * K + o_c
        b_x_i = tl.load(p_x + ((first + a) * K + i) * D + o_d, mask=m_d, other=0.0)
        b_de = tl.load(p_de + o_row[:, None] * D + o_d[None, :], mask=m_cd, other=0.0)
        b_column += b_de * b_x_i[None, :]
        o_part = (a * K + i) * tl.cdiv(O * K, BLOCK_C) + block
        tl.store(p_rows + o_part * D + o_d, tl.sum(b_de * b_x_j, axis=0), mask=m_d)
    o_column = (a * tl.cdiv(K, BLOCK_V) + chunk) * O * K + o_c
    tl.store(p_columns + o_column[:, None] * D + o_d[None, :], b_column, mask=m_cd)


def forward(tile: Sequence[int], x: Tensor, e: Tensor | None, low: Tensor | None) -> None:
    """x (classes + reach, K, D), in fp32 or fp64 → a tile's edges e and low (T, D)."""
    anchors, views, offsets, first, offset, _, _ = tile
    rows, columns, channels = anchors * views, offsets * views, x.shape[-1]
    config = EDGE_START
    with on_device_of(x):
        edge_start_forward_kernel[
            (rows * triton.cdiv(columns, config.block_rows), triton.cdiv(channels, config.block_channels))
        ](
            x,
            e,
            low,
            views,
            columns,
            first,
            offset,
            channels,
            BLOCK_J=config.block_rows,
            BLOCK_D=config.block_channels,
            num_warps=config.num_warps,
        )


def backward(tile: Sequence[int], x: Tensor, de: Tensor, dx: Tensor) -> None:
    """x (classes + reach, K, D), de (T, D), in fp32 or fp64 → dx, as x, += Σ de x_j at anchors, Σ de x_i at columns."""
    tile, config, channels = Tile(*tile), ENDS, de.shape[1]
    by = cut(tile, config.block_columns, config.block_views)
    parts = node_parts(tile, by, channels, de)
    with on_device_of(de):
        edge_start_backward_kernel[places(tile, by, channels, config.block_channels)](
            x,
            de,
            parts.rows,
            parts.columns,
            tile.K,
            tile.O,
            tile.first,
            tile.offset,
            channels,
            COMPUTE=compute_type(de.dtype),
            BLOCK_C=by.columns,
            BLOCK_V=by.views,
            BLOCK_D=config.block_channels,
            num_warps=config.num_warps,
        )
    add_nodes(tile, parts, dx)
