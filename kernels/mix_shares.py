"""Where a tile's mixes lie, how far each negative is pulled towards its anchor, and the gradient of that.

A mix is an anchor and the K negatives of one class. A tile's mixes are numbered forward (A, K, O), the anchor a row and
the negatives columns, then back (A, O - mirrored, K), the other way round. See docs/math/mix.md and kernels/mix.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gcahng.kernels.tiles import TILE

SMALL = tl.constexpr(1e-6)  # torch's pairwise distance adds it to each difference


@triton.jit
def mix_of(o_m, A, K, O, first, offset, mirrored):
    """What mixes o_m (R,) are made of.

    Returns:
        m_forward: whether they are forward, rather than back.
        o_view, o_anchor: the anchor's view and its place in a wrapped tensor.
        o_negative: the place of the first negative; the others follow.
        o_edge, o_step: the edge to that negative, and how far apart the edges to the negatives are.
        m_own: whether the mix is of a class with itself.
    """
    m_forward = o_m < A * K * O
    o_back = tl.where(m_forward, 0, o_m - A * K * O)
    back = tl.maximum(O - mirrored, 1)
    o_a = tl.where(m_forward, o_m // (K * O), o_back // (back * K)).to(tl.int64)
    o_o = tl.where(m_forward, o_m % O, mirrored + o_back // K % back)
    o_view = tl.where(m_forward, o_m // O % K, o_back % K)
    o_row, o_column = (first + o_a) * K, (first + o_a + offset + o_o) * K
    o_anchor = tl.where(m_forward, o_row, o_column) + o_view
    o_negative = tl.where(m_forward, o_column, o_row)
    o_edge = tl.where(m_forward, ((o_a * K + o_view) * O + o_o) * K, (o_a * K * O + o_o) * K + o_view)
    o_step = tl.where(m_forward, 1, O * K)
    return m_forward, o_view, o_anchor, o_negative, o_edge, o_step, offset + o_o == 0


@triton.jit
def shares_of(b_a, b_b, d_plus, m_positive, m_d):
    """Of rows of anchors and negatives (R, BLOCK_D): ratio = min(d⁺/d⁻, 1), d⁻, and whether d⁺ < d⁻, (R,) each.

    m_positive: the negative is the anchor's positive, and no rounding of the same distance makes it farther.
    """
    b_x = tl.where(m_d[None, :], b_a - b_b + SMALL, 0.0)
    b_away = tl.sqrt(tl.sum(b_x * b_x, axis=1))
    m_easy = (d_plus < b_away) & (m_positive == 0)
    return tl.where(m_easy, d_plus / b_away, 1.0), b_away, m_easy


@triton.jit
def is_positive(o_view, m_own, v, K, OWN: tl.constexpr):
    """Whether view v of the negatives' class is the anchor's positive (R,); only a class with itself has that.

    OWN: whether mixes of a class with itself count. Where they do not, it does not matter which of their negatives is
    the positive, and not to ask spares registers.
    """
    if OWN:
        return m_own & ((o_view + 1) % K == v)
    else:
        return m_own


@triton.jit
def view_of(
    p_z,  # (classes + reach, K, D)
    p_kappa,  # (K, K)
    p_theta,  # (A, K, O, K, D)
    mix,
    v,
    m_m,
    K,
    D,
    BLOCK_D: tl.constexpr,
):
    """View v of the negatives' class of mixes: the negatives b and θ of their edges (R, BLOCK_D), and κ (R,)."""
    _, o_view, _, o_negative, o_edge, o_step, _ = mix
    o_d = tl.arange(0, BLOCK_D)
    m_md = m_m[:, None] & (o_d < D)[None, :]
    b_b = tl.load(p_z + (o_negative + v)[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
    b_theta = tl.load(p_theta + (o_edge + v * o_step)[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
    return b_b, b_theta.to(b_b.dtype), tl.load(p_kappa + o_view * K + v, mask=m_m, other=0.0)


@triton.jit
def negatives_of(
    p_z,  # (classes + reach, K, D)
    p_kappa,  # (K, K)
    p_theta,  # (A, K, O, K, D)
    mix,
    b_a,
    b_d_plus,
    pull,
    m_m,
    K,
    D,
    OWN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The negatives N (R, BLOCK_D) of mixes by their anchors b_a (R, BLOCK_D) and d⁺ (R,)."""
    _, o_view, _, _, _, _, m_own = mix
    m_d = tl.arange(0, BLOCK_D) < D
    b_n = b_a
    for v in range(K):
        b_b, b_theta, b_kappa = view_of(p_z, p_kappa, p_theta, mix, v, m_m, K, D, BLOCK_D)
        b_ratio, b_away, m_easy = shares_of(b_a, b_b, b_d_plus, is_positive(o_view, m_own, v, K, OWN), m_d)
        b_rest = (1.0 - b_ratio) * pull
        b_n += b_kappa[:, None] * (b_b - b_a) * (b_ratio[:, None] + b_rest[:, None] * b_theta)
    return b_n


@triton.jit(do_not_specialize=["mixes", *TILE])
def mix_backward_shares_kernel(
    p_z,  # (classes + reach, K, D)
    p_d_plus,  # (classes + reach, K)
    p_kappa,  # (K, K)
    p_pull,  # (1,)
    p_theta,  # (A, K, O, K, D)
    p_dlogits,  # (mixes,) or None
    p_mixed,  # (mixes, D): the negatives N, which are written; where dlogits is None, their gradient, which is read
    p_ratio,  # (2, A, K, O, K): of each edge, forward and back
    p_along,  # (2, A, K, O, K): what the gradient of a difference has along the difference, through d⁻
    p_positive,  # (mixes,): gradients of d⁺
    mixes,
    D: tl.constexpr,
    A,
    K,
    O,
    first,
    offset,
    mirrored,
    classes,
    SQUARE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R mixes. Those of a class with itself have no logits, and so they are left out with them."""
    o_m = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    mix = mix_of(o_m, A, K, O, first, offset, mirrored)
    _, o_view, o_anchor, _, o_edge, o_step, m_own = mix
    m_m = o_m < mixes
    OWN: tl.constexpr = p_dlogits is None
    if not OWN:
        m_m = m_m & (m_own == 0)
    m_md = m_m[:, None] & m_d[None, :]
    pull = tl.load(p_pull)
    b_a = tl.load(p_z + o_anchor[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
    b_d_plus = tl.load(p_d_plus + o_anchor, mask=m_m, other=0.0)
    if p_dlogits is not None:
        b_n = negatives_of(p_z, p_kappa, p_theta, mix, b_a, b_d_plus, pull, m_m, K, D, OWN, BLOCK_D)
        tl.store(p_mixed + o_m.to(tl.int64)[:, None] * D + o_d[None, :], b_n, mask=m_md)
        b_dn = tl.load(p_dlogits + o_m, mask=m_m, other=0.0)[:, None] * b_a + SQUARE * b_n
    else:
        b_dn = tl.load(p_mixed + o_m.to(tl.int64)[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
    b_positive = tl.zeros_like(b_d_plus)
    o_first = o_edge + tl.where(o_m < A * K * O, 0, 1) * (A.to(tl.int64) * K * O * K)
    for v in range(K):
        b_b, b_theta, b_kappa = view_of(p_z, p_kappa, p_theta, mix, v, m_m, K, D, BLOCK_D)
        b_ratio, b_away, m_easy = shares_of(b_a, b_b, b_d_plus, is_positive(o_view, m_own, v, K, OWN), m_d)
        b_d_ratio = b_kappa * tl.sum(b_dn * (b_b - b_a) * (1.0 - pull * b_theta), axis=1)
        b_d_ratio = tl.where(m_easy, b_d_ratio, 0.0)
        b_positive += b_d_ratio / b_away
        tl.store(p_ratio + o_first + v * o_step, b_ratio, mask=m_m)
        tl.store(p_along + o_first + v * o_step, -b_d_ratio * b_ratio / (b_away * b_away), mask=m_m)
    tl.store(p_positive + o_m, tl.where(m_m, b_positive, 0.0), mask=o_m < mixes)
