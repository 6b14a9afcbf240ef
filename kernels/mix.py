"""Mixing: coefficients and embeddings to negatives, and back (how mixes are numbered: mix_shares.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from gcahng.kernels.configs import MIX
from gcahng.kernels.launch import launch_rows
from gcahng.kernels.mix_shares import SMALL, mix_backward_shares_kernel, mix_of, negatives_of, shares_of
from gcahng.kernels.tiles import (
    TILE,
    NodeParts,
    add_nodes,
    channel_places,
    column_part,
    launch_places,
    node_parts,
    place_of,
    row_part,
    row_places,
)

if TYPE_CHECKING:
    from gcahng.engine.schema import TileNumbers
    from gcahng.engine.stages.mix import MixInputs, MixNodeGradients, MixOutputs, MixThetaGradient, MixUpstream


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
    D: tl.constexpr,
    A,
    K,
    O,
    first,
    offset,
    mirrored,
    classes,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R mixes."""
    o_m = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_m = o_m < mixes
    o_d = tl.arange(0, BLOCK_D)
    m_md = m_m[:, None] & (o_d < D)[None, :]
    mix = mix_of(o_m, A, K, O, first, offset, mirrored)
    _, _, o_anchor, _, _, _, _ = mix
    pull = tl.load(p_pull)
    b_a = tl.load(p_z + o_anchor[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
    b_d_plus = tl.load(p_d_plus + o_anchor, mask=m_m, other=0.0)
    b_n = negatives_of(p_z, p_kappa, p_theta, mix, b_a, b_d_plus, pull, m_m, K, D, True, BLOCK_D)
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
    classes,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,  # 1
    BLOCK_D: tl.constexpr,
):
    """One program: an anchor i and BLOCK_C of its columns, both directions."""
    a, i, _, o_c, o_d, m_c, m_d, m_cd = place_of(K, O, D, 0, BLOCK_C, BLOCK_V, BLOCK_D)
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
    p_dtheta += ((a * K + i) * O * K + o_c)[:, None] * D + o_d[None, :]
    tl.store(p_dtheta, b_dtheta.to(p_dtheta.dtype.element_ty), mask=m_cd)


@triton.jit
def upstream_of(
    p_dlogits,  # (mixes,) or None
    p_mixed,  # (mixes, D): N, or where dlogits is None its gradient
    o_m,
    m_m,
    b_anchor,
    o_d,
    D,
    SQUARE: tl.constexpr,
):
    """Of mixes o_m (BLOCK_C,) with these anchors: dN, and the anchors' own gradient beside that of the differences.

    An anchor is the start of its negatives, and a factor of its logits.
    """
    m_md = m_m[:, None] & (o_d < D)[None, :]
    if p_dlogits is not None:
        b_g = tl.load(p_dlogits + o_m, mask=m_m, other=0.0)
        b_n = tl.load(p_mixed + o_m[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
        b_dn = b_g[:, None] * b_anchor + SQUARE * b_n
        b_own = b_dn + b_g[:, None] * b_n
    else:
        b_dn = tl.load(p_mixed + o_m[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
        b_own = b_dn
    return b_dn, b_own


@triton.jit(do_not_specialize=TILE)
def mix_backward_z_kernel(
    p_z,  # (classes + reach, K, D)
    p_kappa,  # (K, K)
    p_pull,  # (1,)
    p_theta,  # (A, K, O, K, D)
    p_dlogits,  # (mixes,) or None
    p_mixed,  # (mixes, D): N, or where dlogits is None its gradient
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
    classes,
    D: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: a place (see tiles.py), BLOCK_D channels, both directions."""
    first_d = tl.program_id(1) * BLOCK_D
    a, chunk, block, o_c, o_d, m_c, m_d, m_cd = place_of(K, O, D, first_d, BLOCK_C, BLOCK_V, BLOCK_D)
    o_o, o_v = o_c // K, o_c % K
    m_out = m_c
    if p_dlogits is not None:  # a class has no logits with itself
        m_out = m_c & (offset + o_o != 0)
    m_back = m_out & (o_o >= mirrored)
    pull = tl.load(p_pull)
    o_j = (first + a + offset) * K + o_c
    b_b = tl.load(p_z + o_j[:, None] * D + o_d[None, :], mask=m_cd, other=0.0)

    o_m = A * K * O + a * (O - mirrored) * K + o_c - mirrored * K
    b_dn_back, b_own = upstream_of(p_dlogits, p_mixed, o_m, m_back, b_b, o_d, D, SQUARE)
    b_column = tl.where(chunk == 0, b_own, 0.0)
    for i in range(chunk * BLOCK_V, tl.minimum((chunk + 1) * BLOCK_V, K)):
        o_row = (a * K + i) * O * K + o_c
        b_a = tl.load(p_z + ((first + a) * K + i) * D + o_d, mask=m_d, other=0.0)[None, :]
        b_difference = b_b - b_a
        b_theta = tl.load(p_theta + o_row[:, None] * D + o_d[None, :], mask=m_cd, other=0.0).to(b_b.dtype)
        b_dn, b_own = upstream_of(p_dlogits, p_mixed, (a * K + i) * O + o_o, m_out, b_a, o_d, D, SQUARE)

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
        b_row = tl.where((o_v == 0)[:, None], b_own, 0.0) - b_d
        o_part = row_part(a, i, block, K, O, BLOCK_C)
        tl.store(p_rows + o_part * D + o_d, tl.sum(b_row, axis=0), mask=m_d)
    o_column = column_part(a, chunk, o_c, 0, K, O, BLOCK_V)
    tl.store(p_columns + o_column[:, None] * D + o_d[None, :], b_column, mask=m_cd)


def _launch_mixes(kernel: Any, inputs: MixInputs, pointers: tuple[Any, ...], **constants: Any) -> None:
    """Launches a kernel whose programs take BLOCK_R mixes each."""
    tile, *nodes = inputs
    launch_rows(kernel, MIX, (_mixes(tile), inputs.z.shape[-1]), (*nodes, *pointers), tuple(tile), **constants)


def _mixes(tile: TileNumbers) -> int:
    return tile.A * tile.K * (2 * tile.O - tile.mirrored)


def forward(inputs: MixInputs, outputs: MixOutputs) -> None:
    """Forms a tile's negatives.

    Args:
        inputs: the tile; embeddings z (classes + reach, K, D); d_plus (classes + reach, K, 1), the distances to the
            positives; kappa (K, K), the views' weights in a mix; pull (0-dim).
        outputs: from theta (T, D), the negatives N (mixes, D), and the logits a·N and squares ‖N‖² (mixes,), these two
            together; each where it is given.
    """
    _launch_mixes(mix_forward_kernel, inputs, tuple(outputs))


def backward_theta(inputs: MixInputs, gradient: MixThetaGradient) -> None:
    """Forms the gradient of a tile's coefficients.

    Args:
        inputs: as `forward` had them.
        gradient: from dn (mixes, D), dtheta (T, D), both directions of an edge together.
    """
    tile, *nodes = inputs
    launch_places(mix_backward_theta_kernel, row_places(tile, inputs.z.shape[-1], MIX), (*nodes, *gradient))


def backward_z(inputs: MixInputs, upstream: MixUpstream, gradients: MixNodeGradients) -> None:
    """Adds the gradient of the embeddings, d⁺ held fixed, and that of d⁺.

    Args:
        inputs: as `forward` had them.
        upstream: theta (T, D), and either dlogits or dn. dlogits (mixes,) are the gradients of the logits a·N, and
            with them that of N is dN = square N + dlogits a; a class's mixes with itself, which are no negatives, are
            left out. dn (mixes, D) is the gradient of N itself; nothing is added to it, and no mix is left out.
        gradients: dz and dd_plus (as z and d_plus), which are added to.

    Raises:
        ValueError: dlogits and dn are both given, or neither is.
    """
    tile, z, d_plus, kappa, pull = inputs
    theta, dlogits, square, dn = upstream
    if dlogits is None and dn is None:
        raise ValueError("dlogits and dn are both None; one of them must be given")
    if dlogits is not None and dn is not None:
        raise ValueError("dlogits and dn are both given; one of them must be None")
    channels, mixes = z.shape[-1], _mixes(tile)
    mixed, positive = z.new_empty(mixes, channels) if dn is None else dn, z.new_empty(mixes)
    rows = tile.A * tile.K * tile.O * tile.K
    ratio, along = z.new_empty(2, rows), z.new_empty(2, rows)
    constants = {"SQUARE": square if dn is None else 0.0}
    pointers = (theta, dlogits, mixed, ratio, along, positive)
    _launch_mixes(mix_backward_shares_kernel, inputs, pointers, **constants)
    places = channel_places(tile, channels)
    parts = node_parts(places, channels, z)
    pointers = (z, kappa, pull, theta, dlogits, mixed, ratio, along, parts.rows, parts.columns)
    launch_places(mix_backward_z_kernel, places, pointers, **constants)
    add_nodes(tile, parts, gradients.dz)
    ahead = tile.A * tile.K * tile.O
    rows_of, columns_of = positive[:ahead], positive[ahead:]
    back = columns_of.view(tile.A, 1, tile.O - tile.mirrored, tile.K, 1)
    add_nodes(tile, NodeParts(rows_of.view(tile.A, tile.K, tile.O, 1), back, tile.mirrored), gradients.dd_plus)
