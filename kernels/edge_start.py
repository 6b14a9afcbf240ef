"""Edge start: e_ij = x_i ∘ x_j, and its backward, two node sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from gcahng.kernels.configs import EDGE_START
from gcahng.kernels.launch import compute_type, on_device_of
from gcahng.kernels.tiles import (
    TILE,
    add_nodes,
    channel_places,
    column_part,
    launch_places,
    node_parts,
    place_of,
    row_part,
)

if TYPE_CHECKING:
    from gcahng.engine.stages.common import EdgesOut
    from gcahng.engine.stages.edge_start import EdgeStartGradients, EdgeStartInputs


@triton.jit(do_not_specialize=["K", "J", "first", "offset"])
def edge_start_forward_kernel(
    p_x,  # (classes + reach, K, D)
    p_e,  # (A, K, J, D) or None
    p_low,  # (A, K, J, D) or None
    K,
    J,
    first,
    offset,
    D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one node of the tile's anchors, BLOCK_J of the J = O · K that it meets, BLOCK_D of the channels."""
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
    A,
    K,
    O,
    first,
    offset,
    mirrored,
    classes,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: a place (see tiles.py), BLOCK_D channels."""
    first_d = tl.program_id(1) * BLOCK_D
    a, chunk, block, o_c, o_d, m_c, m_d, m_cd = place_of(K, O, D, first_d, BLOCK_C, BLOCK_V, BLOCK_D)
    o_j = (first + a + offset) * K + o_c
    b_x_j = tl.load(p_x + o_j[:, None] * D + o_d[None, :], mask=m_cd, other=0.0)
    b_column = tl.zeros((BLOCK_C, BLOCK_D), dtype=COMPUTE)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        o_row = (a * K + i) * O * K + o_c
        b_x_i = tl.load(p_x + ((first + a) * K + i) * D + o_d, mask=m_d, other=0.0)
        b_de = tl.load(p_de + o_row[:, None] * D + o_d[None, :], mask=m_cd, other=0.0).to(COMPUTE)
        b_column += b_de * b_x_i[None, :]
        o_part = row_part(a, i, block, K, O, BLOCK_C)
        tl.store(p_rows + o_part * D + o_d, tl.sum(b_de * b_x_j, axis=0), mask=m_d)
    o_column = column_part(a, chunk, o_c, 0, K, O, BLOCK_V)
    tl.store(p_columns + o_column[:, None] * D + o_d[None, :], b_column, mask=m_cd)


def forward(inputs: EdgeStartInputs, out: EdgesOut) -> None:
    """Forms a tile's edges.

    Args:
        inputs: the tile, and node vectors x (classes + reach, K, D) in fp32 or fp64.
        out: the edges e_ij = x_i ∘ x_j (T, D), in x's type and in that of products, each where it is given.
    """
    tile, x = inputs
    rows, columns, channels = tile.A * tile.K, tile.O * tile.K, x.shape[-1]
    config = EDGE_START
    grid = (rows * triton.cdiv(columns, config.block_rows), triton.cdiv(channels, config.block_channels))
    with on_device_of(x):
        edge_start_forward_kernel[grid](
            x,
            out.full,
            out.low,
            tile.K,
            columns,
            tile.first,
            tile.offset,
            channels,
            BLOCK_J=config.block_rows,
            BLOCK_D=config.block_channels,
            num_warps=config.num_warps,
        )


def backward(inputs: EdgeStartInputs, gradients: EdgeStartGradients) -> None:
    """Adds a tile's part of the gradient of the node vectors.

    Args:
        inputs: as `forward` had them.
        gradients: from de (T, D), dx (as x) += Σ de x_j at anchors and Σ de x_i at columns.
    """
    tile, x = inputs
    de, dx = gradients
    places = channel_places(tile, x.shape[-1])
    parts = node_parts(places, places.channels, dx)
    pointers = (x, de, parts.rows, parts.columns)
    launch_places(edge_start_backward_kernel, places, pointers, COMPUTE=compute_type(dx.dtype))
    add_nodes(tile, parts, dx)
