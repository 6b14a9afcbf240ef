"""The whole edge MLP in one kernel, forward: both products and what follows them, for channels of which a block holds
whole rows. Its hidden vectors never go through memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels._configs import EDGE_MLP, EDGE_MLP_TF32
from gcahng.kernels._hidden_product import forward_epilogue, merged
from gcahng.kernels._launch import on_device_of
from gcahng.kernels._math import NORM_EPS, gelu, inverse_root
from gcahng.kernels._product import block_product, column_parts, columns_joined, dot_precision
from gcahng.kernels._sums import add_partials, partials
from gcahng.kernels._tile import TILE, Tile

MAX_CHANNELS = 128
MAX_CHANNELS_KEPT = 64


def takes(channels: int, itemsize: int, crowded: bool) -> bool:
    """Whether the kernel takes so many channels, of operands of so many bytes: where it has a thread's registers for
    whole rows. Of 16-bit operands an A100 has none left for more beside them (crowded): to write h out, or to form sums
    of an s that is stored in 16 bits."""
    return channels <= (MAX_CHANNELS_KEPT if crowded and itemsize == 2 else MAX_CHANNELS)


@triton.jit(do_not_specialize=["T", *TILE])
def edge_mlp_forward_kernel(
    p_e1,  # (T, D)
    p_low,  # (T, D), e1 in the products' type
    p_w1,  # (4D, D)
    p_b,  # (4D,)
    p_w2,  # (D, 4D)
    p_w,  # (D,)
    p_d,  # (D,)
    p_gamma,  # (D,)
    p_beta,  # (D,)
    p_h,  # (T, 4D) or None
    p_mean,  # (T,) or None
    p_rstd,  # (T,) or None
    p_s,  # (T, D) or None
    p_y,  # (T, D) or None
    p_y_low,  # (T, D) or None
    p_part,  # (row blocks, 2, D) float64 or None: sums of y and y² over a block's rows
    T,
    D,
    K,
    O,
    mirrored,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    ENDS: tl.constexpr,
):
    """One program: BLOCK_M rows, the hidden channels BLOCK_H at a time."""
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = first_m + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < T, o_d < D
    W = 4 * D
    if BLOCK_K == BLOCK_D:
        o = tl.arange(0, BLOCK_M)[:, None] * D + o_d[None, :]
        b_e1 = tl.load(p_low + first_m * D + o, mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_s = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_square = tl.zeros((BLOCK_M,), dtype=tl.float32)
    o_w1 = o_d[:, None] + tl.arange(0, BLOCK_H)[None, :] * D
    o_w2 = tl.arange(0, BLOCK_H)[:, None] + o_d[None, :] * W
    for first in range(0, W, BLOCK_H):
        o_h = first + tl.arange(0, BLOCK_H)
        if BLOCK_K == BLOCK_D:
            p_block = p_w1 + first * D + o_w1
            b_w1 = tl.load(p_block) if EVEN else tl.load(p_block, mask=m_d[:, None] & (o_h < W)[None, :], other=0.0)
            b_h = tl.dot(b_e1, b_w1, input_precision=PRECISION)
        else:
            b_h = block_product(p_low, p_w1, o_m, o_h, T, W, D, D, 1, PRECISION, EVEN, False, BLOCK_M, BLOCK_H, BLOCK_K)
        b_parts, b_gs = column_parts(b_h, PARTS), ()
        for k in tl.static_range(PARTS):
            first_h = first + k * (BLOCK_H // PARTS)
            b_g, b_part, b_part_square, count = forward_epilogue(
                b_parts[k],
                tl.program_id(0),
                first_h,
                p_b,
                p_h,
                None,
                T,
                W,
                p_low.dtype.element_ty,
                EVEN,
                BLOCK_M,
                BLOCK_H // PARTS,
            )
            b_mean, b_square = merged(b_mean, b_square, 1.0 * first_h, b_part, b_part_square, count)
            b_gs = b_gs + (b_g,)
        p_block = p_w2 + first + o_w2
        b_w2 = tl.load(p_block) if EVEN else tl.load(p_block, mask=(o_h < W)[:, None] & m_d[None, :], other=0.0)
        b_s = tl.dot(columns_joined(b_gs, PARTS), b_w2, b_s, input_precision=PRECISION)
    b_rstd = inverse_root(b_square / W + NORM_EPS)
    if p_mean is not None:
        tl.store(p_mean + o_m, b_mean, mask=m_m)
        tl.store(p_rstd + o_m, b_rstd, mask=m_m)
    b_parts = column_parts(b_s, ENDS)
    b_gs = ()
    b_of_g = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_of_g_square = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for k in tl.static_range(ENDS):
        first_d = k * (BLOCK_D // ENDS)
        o_part = first_d + tl.arange(0, BLOCK_D // ENDS)
        m_part = o_part < D
        m_mpart = m_m[:, None] & m_part[None, :]
        o = first_m * D + tl.arange(0, BLOCK_M)[:, None] * D + o_part[None, :]
        b_w = tl.load(p_w + o_part, mask=m_part, other=0.0)
        b_d = tl.load(p_d + o_part, mask=m_part, other=0.0)
        b_e = tl.load(p_e1 + o, mask=m_mpart, other=0.0)
        b_t = (b_parts[k] - b_mean[:, None] * b_w[None, :]) * b_rstd[:, None] + b_d[None, :] + b_e
        if p_s is not None:  # what goes on is what is stored
            b_kept = b_t.to(p_s.dtype.element_ty)
            tl.store(p_s + o, b_kept, mask=m_mpart)
            b_t = b_kept.to(b_w.dtype)
        b_g = gelu(b_t)
        count = tl.minimum(tl.maximum(D - first_d, 0), BLOCK_D // ENDS).to(tl.float32)
        b_part = tl.sum(tl.where(m_part[None, :], b_g, 0.0), axis=1) / tl.maximum(count, 1.0)
        b_centred = tl.where(m_part[None, :], b_g - b_part[:, None], 0.0)
        b_of_g, b_of_g_square = merged(
            b_of_g, b_of_g_square, 1.0 * first_d, b_part, tl.sum(b_centred * b_centred, axis=1), count
        )
        b_gs = b_gs + (b_g,)
    b_rstd = inverse_root(b_of_g_square / D + NORM_EPS)
    for k in tl.static_range(ENDS):
        o_part = k * (BLOCK_D // ENDS) + tl.arange(0, BLOCK_D // ENDS)
        m_part = o_part < D
        m_mpart = m_m[:, None] & m_part[None, :]
        o = first_m * D + tl.arange(0, BLOCK_M)[:, None] * D + o_part[None, :]
        b_gamma = tl.load(p_gamma + o_part, mask=m_part, other=0.0)
        b_beta = tl.load(p_beta + o_part, mask=m_part, other=0.0)
        b_y = (b_gs[k] - b_of_g[:, None]) * b_rstd[:, None] * b_gamma[None, :] + b_beta[None, :]
        if p_y is not None:
            tl.store(p_y + o, b_y, mask=m_mpart)
        if p_y_low is not None:
            tl.store(p_y_low + o, b_y.to(p_y_low.dtype.element_ty), mask=m_mpart)
        if p_part is not None:
            # In float64, as head_moments_kernel: variances are differences of these sums.
            b_wide = tl.where(m_m[:, None], b_y, 0.0).to(tl.float64)
            b_weighted = tl.where(o_m // K % O >= mirrored, 2.0, 1.0)[:, None] * b_wide
            o_sum = tl.program_id(0).to(tl.int64) * 2 * D + o_part
            tl.store(p_part + o_sum, tl.sum(b_weighted, axis=0), mask=m_part)
            tl.store(p_part + o_sum + D, tl.sum(b_weighted * b_wide, axis=0), mask=m_part)


def forward(
    tile: Sequence[int],
    e1: Tensor,
    low: Tensor,
    w1: Tensor,
    b: Tensor,
    w2: Tensor,
    w: Tensor,
    d: Tensor,
    gamma: Tensor,
    beta: Tensor,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    s: Tensor | None,
    y: Tensor | None,
    y_low: Tensor | None,
    sums: Tensor | None,
) -> None:
    """e1 (T, D), low: e1 as operand, w1 (4D, D), w2 = W2' (D, 4D) → of these, those that are given: h = e1 W1ᵀ (T, 4D);
    the row moments mean and rstd (T, 1) of g = GELU(h + b); s = (g W2'ᵀ - mean w) rstd + d + e1 (T, D), which goes on
    as it was stored; y and y_low = LayerNorm(GELU(s)) (T, D); sums (2, D) float64 += Σ y and Σ y² over the ordered
    pairs that the tile stands for. fp32, bf16 or fp16, as `takes` says."""
    rows, dim = e1.shape
    if not e1.numel():
        return
    tile = Tile(*tile)
    block_d = max(16, triton.next_power_of_2(dim))
    precision = dot_precision()
    config = EDGE_MLP_TF32 if low.itemsize == 4 and precision == "tf32" else EDGE_MLP[low.itemsize]
    block_k = min(block_d, config.block_k)
    blocks = triton.cdiv(rows, config.block_m)
    part = None if sums is None else partials(e1, blocks, 2 * dim, torch.float64)
    with on_device_of(e1):
        edge_mlp_forward_kernel[(blocks,)](
            e1,
            low,
            w1,
            b,
            w2,
            w,
            d,
            gamma,
            beta,
            h,
            mean,
            rstd,
            s,
            y,
            y_low,
            part,
            rows,
            dim,
            tile.K,
            tile.O,
            tile.mirrored,
            PRECISION=precision,
            EVEN=dim == block_d and 4 * dim % config.block_n == 0,
            BLOCK_M=config.block_m,
            BLOCK_H=config.block_n,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            PARTS=config.parts,
            ENDS=config.joined,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if part is not None:
        add_partials(part, sums)
