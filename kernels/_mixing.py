"""What the mixing's kernels share. A mix is an anchor and the K negatives of one class; a tile's mixes are numbered
forward (A, K, O), the anchor a row and the negatives columns, then back (A, O - mirrored, K), the other way round."""

from __future__ import annotations

import triton
import triton.language as tl

SMALL = tl.constexpr(1e-6)  # torch's pairwise distance adds it to each difference


@triton.jit
def mix_of(o_m, A, K, O, first, offset, mirrored):
    """Of mixes o_m: forward or back, the anchor's view and place, the place of the first negative (the others follow),
    the edge to it, how far apart the edges to negatives are, and whether this is a class with itself."""
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
    """Rows of anchors and negatives → ratio = min(d⁺/d⁻, 1), d⁻, and whether d⁺ < d⁻, (R,) each. m_positive: the
    negative is the anchor's positive, and no rounding of the same distance makes it farther."""
    b_x = tl.where(m_d[None, :], b_a - b_b + SMALL, 0.0)
    b_away = tl.sqrt(tl.sum(b_x * b_x, axis=1))
    m_easy = (d_plus < b_away) & (m_positive == 0)
    return tl.where(m_easy, d_plus / b_away, 1.0), b_away, m_easy
