"""Edge to node: S_i = Σ_j GELU(product_ij + bias), at both ends of edges, and its backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from gcahng.kernels.configs import EDGE_TO_NODE
from gcahng.kernels.functions import gelu, gelu_and_slope
from gcahng.kernels.launch import compute_type
from gcahng.kernels.sums import add_partials, partials
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
    from gcahng.engine.stages.edge_to_node import EdgeToNodeGradients, EdgeToNodeInputs, EdgeToNodeSum


@triton.jit(do_not_specialize=TILE)
def edge_to_node_forward_kernel(
    p_product,  # (A, K, O, K, D)
    p_bias,  # (D,)
    p_rows,  # (A, K, blocks, D)
    p_columns,  # (A, chunks, O - mirrored, K, D)
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
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
    b_column = tl.zeros((BLOCK_C, BLOCK_D), dtype=COMPUTE)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        o_row = (a * K + i) * O * K + o_c
        b_product = tl.load(p_product + o_row[:, None] * D + o_d[None, :], mask=m_cd, other=0.0).to(COMPUTE)
        b_g = tl.where(m_cd, gelu(b_product + b_bias[None, :]), 0.0)
        b_column += b_g
        o_part = row_part(a, i, block, K, O, BLOCK_C)
        tl.store(p_rows + o_part * D + o_d, tl.sum(b_g, axis=0), mask=m_d)
    skip = mirrored * K
    o_column = column_part(a, chunk, o_c, skip, K, O, BLOCK_V)
    tl.store(p_columns + o_column[:, None] * D + o_d[None, :], b_column, mask=m_cd & (o_c >= skip)[:, None])


@triton.jit(do_not_specialize=TILE)
def edge_to_node_backward_kernel(
    p_product,  # (A, K, O, K, D)
    p_bias,  # (D,)
    p_ds,  # (classes + reach, K, D)
    p_dp,  # (A, K, O, K, D), may be the product
    p_part,  # (programs, D) or None
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
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
    o_j = (first + a + offset) * K + o_c
    m_back = m_cd & (o_c >= mirrored * K)[:, None]
    b_ds_j = tl.load(p_ds + o_j[:, None] * D + o_d[None, :], mask=m_back, other=0.0)
    b_sum = tl.zeros((BLOCK_C, BLOCK_D), dtype=COMPUTE)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        o = ((a * K + i) * O * K + o_c)[:, None] * D + o_d[None, :]
        b_ds_i = tl.load(p_ds + ((first + a) * K + i) * D + o_d, mask=m_d, other=0.0)
        b_x = tl.load(p_product + o, mask=m_cd, other=0.0).to(COMPUTE) + b_bias[None, :]
        _, b_slope = gelu_and_slope(b_x)
        b_dp = (b_ds_i[None, :] + b_ds_j) * b_slope
        tl.store(p_dp + o, b_dp.to(p_dp.dtype.element_ty), mask=m_cd)
        b_sum += tl.where(m_cd, b_dp, 0.0)
    if p_part is not None:
        tl.store(p_part + tl.program_id(0).to(tl.int64) * D + o_d, tl.sum(b_sum, axis=0), mask=m_d)


def forward(inputs: EdgeToNodeInputs, out: EdgeToNodeSum) -> None:
    """Adds a tile's edges to the sums at their ends.

    Args:
        inputs: the tile, the product of its edges (T, D) without the bias, in any type, and the bias (D,).
        out: sum (classes + reach, K, D), in the bias's type, += Σ GELU(product + bias), at both ends of edges that
            stand for both directions.
    """
    tile, product, bias = inputs
    places = channel_places(tile, product.shape[1], EDGE_TO_NODE)
    parts = node_parts(places, places.channels, bias, skip=tile.mirrored)
    pointers = (product, bias, parts.rows, parts.columns)
    launch_places(edge_to_node_forward_kernel, places, pointers, COMPUTE=compute_type(bias.dtype))
    add_nodes(tile, parts, out.sum)


def backward(inputs: EdgeToNodeInputs, gradients: EdgeToNodeGradients) -> None:
    """Forms the gradient of a tile's product.

    Args:
        inputs: as `forward` had them.
        gradients: from ds (classes + reach, K, D), the gradient of the sums, dp (T, D), which may be the product, and
            db (D,) += Σ dp where it is given.
    """
    tile, product, bias = inputs
    ds, dp, db = gradients
    places = channel_places(tile, product.shape[1], EDGE_TO_NODE)
    part = None if db is None else partials(bias, places.grid[0], places.channels)
    pointers = (product, bias, ds, dp, part)
    launch_places(edge_to_node_backward_kernel, places, pointers, COMPUTE=compute_type(bias.dtype))
    if db is not None:
        add_partials(part, db)
