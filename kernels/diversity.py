"""J_div of a tile of coefficients: sums of x = θ - ½ and of its squares, and the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from gcahng.kernels.launch import compute_type
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
    from gcahng.engine.stages.diversity import DiversityGradient, DiversityInputs, DiversityOutputs


@triton.jit(do_not_specialize=TILE)
def diversity_forward_kernel(
    p_theta,  # (A, K, O, K, D)
    p_rows,  # (A, K, blocks, D)
    p_columns,  # (A, chunks, O - mirrored, K, D)
    p_squares,  # (A, K, blocks, D)
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
    skip = mirrored * K
    b_directions = tl.where(o_c >= skip, 2.0, 1.0).to(COMPUTE)
    b_column = tl.zeros((BLOCK_C, BLOCK_D), dtype=COMPUTE)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        o_row = (a * K + i) * O * K + o_c
        b_theta = tl.load(p_theta + o_row[:, None] * D + o_d[None, :], mask=m_cd, other=0.5)
        b_x = b_theta.to(COMPUTE) - 0.5
        b_column += b_x
        o_part = row_part(a, i, block, K, O, BLOCK_C) * D + o_d
        tl.store(p_rows + o_part, tl.sum(b_x, axis=0), mask=m_d)
        tl.store(p_squares + o_part, tl.sum(b_directions[:, None] * b_x * b_x, axis=0), mask=m_d)
    o_column = column_part(a, chunk, o_c, skip, K, O, BLOCK_V)
    tl.store(p_columns + o_column[:, None] * D + o_d[None, :], b_column, mask=m_cd & (o_c >= skip)[:, None])


@triton.jit(do_not_specialize=TILE)
def diversity_backward_kernel(
    p_theta,  # (A, K, O, K, D)
    p_mean,  # (classes + reach, K, D)
    p_scale,  # (1,)
    p_dtheta,  # (A, K, O, K, D)
    A,
    K,
    O,
    first,
    offset,
    mirrored,
    classes,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: a place (see tiles.py), BLOCK_D channels."""
    first_d = tl.program_id(1) * BLOCK_D
    a, chunk, _, o_c, o_d, _, m_d, m_cd = place_of(K, O, D, first_d, BLOCK_C, BLOCK_V, BLOCK_D)
    b_scale = tl.load(p_scale)
    b_both = (o_c >= mirrored * K)[:, None]
    o_j = (first + a + offset) * K + o_c
    b_mean_j = tl.load(p_mean + o_j[:, None] * D + o_d[None, :], mask=m_cd & b_both, other=0.0)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        o = ((a * K + i) * O * K + o_c)[:, None] * D + o_d[None, :]
        b_mean_i = tl.load(p_mean + ((first + a) * K + i) * D + o_d, mask=m_d, other=0.0)
        b_theta = tl.load(p_theta + o, mask=m_cd, other=0.0).to(b_scale.dtype)
        b_away = b_theta - b_mean_i[None, :] + tl.where(b_both, b_theta - b_mean_j, 0.0)
        b_dtheta = tl.load(p_dtheta + o, mask=m_cd, other=0.0).to(b_scale.dtype) + b_scale * b_away
        tl.store(p_dtheta + o, b_dtheta.to(p_dtheta.dtype.element_ty), mask=m_cd)


def forward(inputs: DiversityInputs, outputs: DiversityOutputs) -> None:
    """Adds a tile's coefficients to the sums of x = θ - ½ and of its squares.

    Args:
        inputs: the tile, and θ (T, D).
        outputs: sum (classes + reach, K, D) += Σ x, at both ends of edges that stand for both directions; square, of
            the same shape, += Σ x² at the anchors, twice where an edge stands for both directions.
    """
    tile, theta = inputs
    places = channel_places(tile, theta.shape[1])
    sums = node_parts(places, places.channels, outputs.sum, skip=tile.mirrored)
    squares = node_parts(places, places.channels, outputs.square, skip=tile.O)
    pointers = (theta, sums.rows, sums.columns, squares.rows)
    launch_places(diversity_forward_kernel, places, pointers, COMPUTE=compute_type(outputs.sum.dtype))
    add_nodes(tile, sums, outputs.sum)
    add_nodes(tile, squares, outputs.square)


def backward(inputs: DiversityInputs, gradient: DiversityGradient) -> None:
    """Adds the gradient of a tile's coefficients.

    Args:
        inputs: as `forward` had them.
        gradient: from the means (classes + reach, K, D) of θ and the scale (0-dim), dtheta (T, D) += scale (θ -
            mean_i), and scale (θ - mean_j) where an edge stands for both directions.
    """
    tile, theta = inputs
    pointers = (theta, gradient.mean, gradient.scale, gradient.dtheta)
    launch_places(diversity_backward_kernel, channel_places(tile, theta.shape[1]), pointers)
