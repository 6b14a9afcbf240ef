"""The hidden layer of the edge MLP: bias, GELU and row moments behind the first product, and its backward between two
products; and the launchers of both in the epilogue of the product before them (kernels in mlp_in_product.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import MLP_IN_PRODUCT, MLP_IN_PRODUCT_BACKWARD, ROWS, ROWS_BACKWARD
from gcahng.kernels.functions import gelu, hidden_vjp, row_moments
from gcahng.kernels.launch import on_device_of, row_block
from gcahng.kernels.mlp_in_product import (
    merge_moments_kernel,
    mlp_in_product_backward_kernel,
    mlp_in_product_forward_kernel,
)
from gcahng.kernels.product import dot_precision
from gcahng.kernels.sums import add_partials, partials, rows_each

_BACKWARD_COLUMNS = 512
_MERGED_ROWS = 128


@triton.jit(do_not_specialize=["T"])
def mlp_in_forward_kernel(
    p_h,  # (T, W)
    p_b,  # (W,)
    p_g,  # (T, W), may be h
    p_mean,  # (T,)
    p_rstd,  # (T,)
    T,
    W,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program: BLOCK_R rows. The moments are those of g as it is stored."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_w = tl.arange(0, BLOCK_W)
    m_r, m_w = o_r < T, o_w < W
    m_rw = m_r[:, None] & m_w[None, :]
    o = o_r[:, None] * W + o_w[None, :]
    b_b = tl.load(p_b + o_w, mask=m_w, other=0.0)
    b_h = tl.load(p_h + o, mask=m_rw, other=0.0)
    b_g = gelu(b_h.to(b_b.dtype) + b_b[None, :]).to(p_g.dtype.element_ty)
    tl.store(p_g + o, b_g, mask=m_rw)
    b_mean, b_rstd = row_moments(tl.where(m_w[None, :], b_g.to(b_b.dtype), 0.0), m_w[None, :], W)
    tl.store(p_mean + o_r, b_mean, mask=m_r)
    tl.store(p_rstd + o_r, b_rstd, mask=m_r)


@triton.jit(do_not_specialize=["T", "rows"])
def mlp_in_backward_kernel(
    p_h,  # (T, W)
    p_b,  # (W,)
    p_dn,  # (T, W)
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_m1,  # (T,)
    p_m2,  # (T,)
    p_g,  # (T, W), may be h
    p_dh,  # (T, W), may be dn
    p_part,  # (P, W) or None: sums of dh over a program's rows
    T,
    W,
    rows,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program: `rows` rows, BLOCK_R at a time, and BLOCK_W columns."""
    first_row = tl.program_id(0).to(tl.int64) * rows
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_w = o_w < W
    b_b = tl.load(p_b + o_w, mask=m_w, other=0.0)
    b_sum = tl.zeros((BLOCK_R, BLOCK_W), dtype=b_b.dtype)
    for first in range(0, rows, BLOCK_R):
        o_r = first_row + first + tl.arange(0, BLOCK_R)
        m_r = o_r < T
        m_rw = m_r[:, None] & m_w[None, :]
        o = o_r[:, None] * W + o_w[None, :]
        b_h = tl.load(p_h + o, mask=m_rw, other=0.0)
        b_dn = tl.load(p_dn + o, mask=m_rw, other=0.0)
        b_mean = tl.load(p_mean + o_r, mask=m_r, other=0.0)
        b_rstd = tl.load(p_rstd + o_r, mask=m_r, other=0.0)
        b_m1 = tl.load(p_m1 + o_r, mask=m_r, other=0.0)
        b_m2 = tl.load(p_m2 + o_r, mask=m_r, other=0.0)
        b_g, b_dh = hidden_vjp(b_h, b_b, b_dn, b_mean, b_rstd, b_m1, b_m2, p_g.dtype.element_ty)
        tl.store(p_g + o, b_g, mask=m_rw)
        tl.store(p_dh + o, b_dh.to(p_dh.dtype.element_ty), mask=m_rw)
        b_sum += b_dh  # rows past the last have rstd = 0, and so dh = 0
    if p_part is not None:
        tl.store(p_part + tl.program_id(0).to(tl.int64) * W + o_w, tl.sum(b_sum, axis=0), mask=m_w)


def forward(h: Tensor, b: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """h (T, W), the product without its bias b → g = GELU(h + b) (T, W), and its row moments (T, 1)."""
    rows, width = h.shape
    block_r, block_w = row_block(width, ROWS)
    if h.numel():
        with on_device_of(h):
            mlp_in_forward_kernel[(triton.cdiv(rows, block_r),)](
                h, b, g, mean, rstd, rows, width, BLOCK_R=block_r, BLOCK_W=block_w, num_warps=ROWS.num_warps
            )


def backward(
    h: Tensor,
    b: Tensor,
    dn: Tensor,
    mean: Tensor,
    rstd: Tensor,
    m1: Tensor,
    m2: Tensor,
    g: Tensor,
    dh: Tensor,
    db: Tensor | None,
) -> None:
    """dn (T, W), the gradient of the normalised rows → g again and dh (T, W), and db (W) += Σ dh."""
    rows, width = h.shape
    config = ROWS_BACKWARD
    block_w = min(triton.next_power_of_2(width), _BACKWARD_COLUMNS)
    block_r = max(1, config.values // block_w)
    columns = triton.cdiv(width, block_w)
    each = rows_each(rows, block_r, triton.cdiv(config.programs, columns))
    if h.numel():
        part = None if db is None else partials(b, triton.cdiv(rows, each), width)
        with on_device_of(h):
            mlp_in_backward_kernel[(triton.cdiv(rows, each), columns)](
                h,
                b,
                dn,
                mean,
                rstd,
                m1,
                m2,
                g,
                dh,
                part,
                rows,
                width,
                each,
                BLOCK_R=block_r,
                BLOCK_W=block_w,
                num_warps=config.num_warps,
            )
        if part is not None:
            add_partials(part, db)


# -- in the epilogue of a product


def product_forward(e1: Tensor, w1: Tensor, b: Tensor, h: Tensor | None, g: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """e1 (T, D), w1 (W, D), both in the products' type → g = GELU(h + b) (T, W) and its row moments (T, 1); h = e1 W1ᵀ
    (T, W) is stored where it is given. fp32, bf16 or fp16."""
    (rows, dim), width = e1.shape, w1.shape[0]
    if not g.numel():
        return
    config = MLP_IN_PRODUCT[e1.itemsize]
    blocks = triton.cdiv(width, config.block_n)
    joined = config.block_n // config.parts * config.joined  # columns whose moments come as one
    parts = torch.empty(
        2, triton.cdiv(width, config.block_n) * config.block_n // joined, rows, dtype=mean.dtype, device=mean.device
    )
    with on_device_of(e1):
        mlp_in_product_forward_kernel[(triton.cdiv(rows, config.block_m) * blocks,)](
            e1,
            w1,
            b,
            h,
            g,
            parts[0],
            parts[1],
            rows,
            dim,
            width,
            PRECISION=dot_precision(),
            EVEN_K=dim % config.block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP=config.group,
            PARTS=config.parts,
            JOINED=config.joined,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        merge_moments_kernel[(triton.cdiv(rows, _MERGED_ROWS),)](
            parts[0], parts[1], mean, rstd, rows, width, BLOCK_N=joined, BLOCK_R=_MERGED_ROWS, num_warps=4
        )


def product_backward(
    ds: Tensor,
    w2: Tensor,
    h: Tensor,
    b: Tensor,
    mean: Tensor,
    rstd: Tensor,
    m1: Tensor,
    m2: Tensor,
    g: Tensor,
    dh: Tensor,
    db: Tensor | None,
) -> None:
    """ds (T, D), w2 = W2' (D, W) → as `backward` of dn = ds W2', which is not stored. fp32, bf16 or fp16."""
    (rows, dim), width = ds.shape, w2.shape[1]
    if not g.numel():
        return
    config = MLP_IN_PRODUCT_BACKWARD[ds.itemsize]
    blocks_m, blocks_n = triton.cdiv(rows, config.block_m), triton.cdiv(width, config.block_n)
    part = None if db is None else partials(b, blocks_m, width)
    with on_device_of(ds):
        mlp_in_product_backward_kernel[(blocks_m * blocks_n,)](
            ds,
            w2,
            h,
            b,
            mean,
            rstd,
            m1,
            m2,
            g,
            dh,
            part,
            rows,
            dim,
            width,
            PRECISION=dot_precision(),
            EVEN_K=dim % config.block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP=config.group,
            PARTS=config.parts,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if part is not None:
        add_partials(part, db)
