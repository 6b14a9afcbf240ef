"""Kernels of the hidden layer of the edge MLP in the epilogue of the product before it: forward behind e¹ W₁ᵀ, backward
behind ds W₂'."""

from __future__ import annotations

import triton
import triton.language as tl

from gcahng.kernels.functions import NORM_EPS, gelu, hidden_vjp, inverse_root
from gcahng.kernels.product import block_of, block_places, block_product, column_parts


@triton.jit
def merged(mean, square, seen, part_mean, part_square, count):
    """Mean and sum of squared deviations of `seen` values joined by `count` more, by Chan's formula."""
    share = count / tl.maximum(seen + count, 1.0)
    b_delta = part_mean - mean
    return mean + b_delta * share, square + part_square + b_delta * b_delta * (seen * share)


@triton.jit
def forward_epilogue(
    h,
    block_m,
    first_n,
    p_bias,  # (W,)
    p_h,  # (T, W) or None
    p_g,  # (T, W) or None
    T,
    W: tl.constexpr,
    STORED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A part h (BLOCK_M, BLOCK_N) of the product, the columns from first_n on of what the kernel writes, to g.

    STORED is g's type in memory. EVEN says that all of the columns are there, in every part.

    Returns:
        g as it is stored, 0 past the last column; each row's mean of it and sum of squared deviations from that; how
        many columns there are.
    """
    first_m, _, o_n, m_m, m_n, o = block_places(block_m, first_n, T, W, BLOCK_M, BLOCK_N)
    m_mn = m_m[:, None] if EVEN else m_m[:, None] & m_n[None, :]
    b_h = h.to(STORED)
    if p_h is not None:
        tl.store(p_h + first_m * W + o, b_h, mask=m_mn)
    b_bias = tl.load(p_bias + o_n) if EVEN else tl.load(p_bias + o_n, mask=m_n, other=0.0)
    b_stored = gelu(b_h.to(b_bias.dtype) + b_bias[None, :]).to(STORED)
    if p_g is not None:
        tl.store(p_g + first_m * W + o, b_stored, mask=m_mn)
    if not EVEN:
        b_stored = tl.where(m_n[None, :], b_stored, 0.0)
    b_g = b_stored.to(b_bias.dtype)
    count = tl.maximum(tl.minimum(W - first_n, BLOCK_N), 0).to(tl.float32)
    b_mean = tl.sum(b_g, axis=1) / tl.maximum(count, 1.0)
    b_centered = b_g - b_mean[:, None]
    if not EVEN:
        b_centered = tl.where(m_n[None, :], b_centered, 0.0)
    return b_stored, b_mean, tl.sum(b_centered * b_centered, axis=1), count


@triton.jit(do_not_specialize=["T"])
def mlp_in_product_forward_kernel(
    p_e1,  # (T, D)
    p_w1,  # (W, D)
    p_bias,  # (W,)
    p_h,  # (T, W) or None
    p_g,  # (T, W)
    p_mean,  # (column parts, T), parts of JOINED of the epilogue's
    p_square,  # (column parts, T)
    T,
    D: tl.constexpr,
    W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    JOINED: tl.constexpr,
):
    """One program: a block of g = GELU(h + bias), h = e1 W1ᵀ rounded as it would be stored; and means and sums of
    squared deviations of its rows, part by part, of g as it is stored."""
    block_m, block_n = block_of(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(W, BLOCK_N), GROUP)
    o_m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_h = block_product(p_e1, p_w1, o_m, o_n, T, W, D, D, 1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    b_parts = column_parts(b_h, PARTS)
    for k in tl.static_range(PARTS):
        first_n = block_n * BLOCK_N + k * (BLOCK_N // PARTS)
        _, b_part, b_part_square, count = forward_epilogue(
            b_parts[k],
            block_m,
            first_n,
            p_bias,
            p_h,
            p_g,
            T,
            W,
            p_g.dtype.element_ty,
            W % BLOCK_N == 0,
            BLOCK_M,
            BLOCK_N // PARTS,
        )
        if k % JOINED == 0:
            b_mean, b_square = b_part, b_part_square
        else:
            seen = 1.0 * (k % JOINED) * (BLOCK_N // PARTS)
            b_mean, b_square = merged(b_mean, b_square, seen, b_part, b_part_square, count)
        if k % JOINED == JOINED - 1:
            o_part = (block_n * (PARTS // JOINED) + k // JOINED).to(tl.int64) * T + o_m
            tl.store(p_mean + o_part, b_mean, mask=o_m < T)
            tl.store(p_square + o_part, b_square, mask=o_m < T)


@triton.jit(do_not_specialize=["T"])
def merge_moments_kernel(
    p_means,  # (column parts, T)
    p_squares,  # (column parts, T)
    p_mean,  # (T,)
    p_rstd,  # (T,)
    T,
    W: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns a part
    BLOCK_R: tl.constexpr,
):
    """Mean and 1/σ of rows from those of their parts. One program: BLOCK_R rows."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < T
    b_mean = tl.zeros((BLOCK_R,), dtype=tl.float32)
    b_square = tl.zeros((BLOCK_R,), dtype=tl.float32)
    o_part = o_r
    seen = 0.0
    for first in range(0, W, BLOCK_N):
        count = tl.minimum(W - first, BLOCK_N).to(tl.float32)
        b_part = tl.load(p_means + o_part, mask=m_r, other=0.0)
        b_part_square = tl.load(p_squares + o_part, mask=m_r, other=0.0)
        b_mean, b_square = merged(b_mean, b_square, seen, b_part, b_part_square, count)
        seen += count
        o_part += T
    tl.store(p_mean + o_r, b_mean, mask=m_r)
    tl.store(p_rstd + o_r, inverse_root(b_square / W + NORM_EPS), mask=m_r)


@triton.jit
def backward_epilogue(
    dn,
    block_m,
    first_n,
    p_h,  # (T, W)
    p_bias,  # (W,)
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_mean_dn,  # (T,)
    p_mean_n_dn,  # (T,)
    p_g,  # (T, W), may be h
    p_dh,  # (T, W)
    p_part,  # (row blocks, W) or None
    T,
    W: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A part dn (BLOCK_M, BLOCK_N) of the product, the columns from first_n on of what the kernel writes, to g, dh and
    dh's sums. EVEN says that all of the columns are there, in every part."""
    first_m, o_m, o_n, m_m, m_n, o = block_places(block_m, first_n, T, W, BLOCK_M, BLOCK_N)
    m_mn = m_m[:, None] if EVEN else m_m[:, None] & m_n[None, :]
    b_h = tl.load(p_h + first_m * W + o, mask=m_mn, other=0.0)
    b_bias = tl.load(p_bias + o_n, mask=m_n, other=0.0)
    b_mean = tl.load(p_mean + o_m, mask=m_m, other=0.0)
    b_rstd = tl.load(p_rstd + o_m, mask=m_m, other=0.0)
    b_mean_dn = tl.load(p_mean_dn + o_m, mask=m_m, other=0.0)
    b_mean_n_dn = tl.load(p_mean_n_dn + o_m, mask=m_m, other=0.0)
    b_g, b_dh = hidden_vjp(b_h, b_bias, dn, b_mean, b_rstd, b_mean_dn, b_mean_n_dn, p_g.dtype.element_ty)
    tl.store(p_g + first_m * W + o, b_g, mask=m_mn)
    tl.store(p_dh + first_m * W + o, b_dh.to(p_dh.dtype.element_ty), mask=m_mn)
    if p_part is not None:  # rows past the last have rstd = 0, and so dh = 0
        tl.store(p_part + block_m.to(tl.int64) * W + o_n, tl.sum(b_dh, axis=0), mask=m_n)


@triton.jit(do_not_specialize=["T"])
def mlp_in_product_backward_kernel(
    p_ds,  # (T, D)
    p_w2,  # (D, W)
    p_h,  # (T, W)
    p_bias,  # (W,)
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_mean_dn,  # (T,)
    p_mean_n_dn,  # (T,)
    p_g,  # (T, W), may be h
    p_dh,  # (T, W)
    p_part,  # (row blocks, W) or None: sums of dh over a block's rows
    T,
    D: tl.constexpr,
    W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program: a block of dn = ds W2', and from it, part by part, of dh and g."""
    block_m, block_n = block_of(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(W, BLOCK_N), GROUP)
    o_m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_dn = block_product(p_ds, p_w2, o_m, o_n, T, W, D, 1, W, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    b_parts = column_parts(b_dn, PARTS)
    for k in tl.static_range(PARTS):
        backward_epilogue(
            b_parts[k],
            block_m,
            block_n * BLOCK_N + k * (BLOCK_N // PARTS),
            p_h,
            p_bias,
            p_mean,
            p_rstd,
            p_mean_dn,
            p_mean_n_dn,
            p_g,
            p_dh,
            p_part,
            T,
            W,
            W % BLOCK_N == 0,
            BLOCK_M,
            BLOCK_N // PARTS,
        )
