"""The end of the edge MLP: LayerNorm's fold, residual, and LayerNorm(GELU(·)), and its backward before the products;
and the forward in the epilogue of the product before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import MLP_OUT_PRODUCT, ROWS, ROWS_BACKWARD
from gcahng.kernels.functions import norm_gelu, norm_gelu_backward
from gcahng.kernels.launch import launch_rows, on_device_of, row_block, rows_at
from gcahng.kernels.product import block_of, block_places, block_product, column_parts, product_constants
from gcahng.kernels.sums import add_partials, partials, rows_each

if TYPE_CHECKING:
    from gcahng.engine.stages.common import RowMoments
    from gcahng.engine.stages.mlp_out import Fold, MlpOutGradients, MlpOutInputs, MlpOutOutputs, MlpOutReplay


@triton.jit(do_not_specialize=["T"])
def mlp_out_forward_kernel(
    p_product,  # (T, D)
    p_e1,  # (T, D)
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_w,  # (D,)
    p_d,  # (D,)
    p_gamma,  # (D,)
    p_beta,  # (D,)
    p_s,  # (T, D)
    p_y,  # (T, D) or None
    p_low,  # (T, D) or None
    T,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R rows."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_r, m_r, o, m_rd = rows_at(tl.program_id(0).to(tl.int64) * BLOCK_R, o_d, T, D, BLOCK_R)
    b_w = tl.load(p_w + o_d, mask=m_d, other=0.0)
    b_d = tl.load(p_d + o_d, mask=m_d, other=0.0)
    b_mean = tl.load(p_mean + o_r, mask=m_r, other=0.0)
    b_rstd = tl.load(p_rstd + o_r, mask=m_r, other=0.0)
    b_e1 = tl.load(p_e1 + o, mask=m_rd, other=0.0).to(b_w.dtype)
    b_s = tl.load(p_product + o, mask=m_rd, other=0.0).to(b_w.dtype)
    b_s = (b_s - b_mean[:, None] * b_w[None, :]) * b_rstd[:, None] + b_d[None, :] + b_e1
    b_stored = b_s.to(p_s.dtype.element_ty)
    tl.store(p_s + o, b_stored, mask=m_rd)
    if p_y is not None or p_low is not None:
        b_gamma = tl.load(p_gamma + o_d, mask=m_d, other=0.0)
        b_beta = tl.load(p_beta + o_d, mask=m_d, other=0.0)
        b_y = norm_gelu(b_stored.to(b_w.dtype), b_gamma, b_beta, m_d[None, :], D)
        if p_y is not None:
            tl.store(p_y + o, b_y, mask=m_rd)
        if p_low is not None:
            tl.store(p_low + o, b_y.to(p_low.dtype.element_ty), mask=m_rd)


@triton.jit(do_not_specialize=["T", "rows"])
def mlp_out_backward_kernel(
    p_s,  # (T, D)
    p_e1,  # (T, D)
    p_dy,  # (T, D)
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_w,  # (D,)
    p_d,  # (D,)
    p_gamma,  # (D,)
    p_ds,  # (T, D), may be dy
    p_low,  # (T, D) or None
    p_scaled,  # (T, D)
    p_mean_dn,  # (T,)
    p_mean_n_dn,  # (T,)
    p_part,  # (P, 4, D) or None: sums over a program's rows, of dgamma, dbeta, ds, and ds rstd mean
    T,
    D: tl.constexpr,
    rows,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: `rows` rows, BLOCK_R at a time."""
    first_row = tl.program_id(0).to(tl.int64) * rows
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_gamma = tl.load(p_gamma + o_d, mask=m_d, other=0.0)
    b_w = tl.load(p_w + o_d, mask=m_d, other=0.0)
    b_d = tl.load(p_d + o_d, mask=m_d, other=0.0)
    b_dgamma = tl.zeros((BLOCK_D,), dtype=b_gamma.dtype)
    b_dbeta = tl.zeros((BLOCK_D,), dtype=b_gamma.dtype)
    b_total = tl.zeros((BLOCK_D,), dtype=b_gamma.dtype)
    b_means = tl.zeros((BLOCK_D,), dtype=b_gamma.dtype)
    for first in range(0, rows, BLOCK_R):
        o_r, m_r, o, m_rd = rows_at(first_row + first, o_d, T, D, BLOCK_R)
        b_s = tl.load(p_s + o, mask=m_rd, other=0.0).to(b_gamma.dtype)
        b_dy = tl.load(p_dy + o, mask=m_rd, other=0.0).to(b_gamma.dtype)
        b_e1 = tl.load(p_e1 + o, mask=m_rd, other=0.0).to(b_gamma.dtype)
        b_mean = tl.load(p_mean + o_r, mask=m_r, other=0.0)
        b_rstd = tl.load(p_rstd + o_r, mask=m_r, other=0.0)
        b_ds, b_normalized = norm_gelu_backward(b_s, b_gamma, b_dy, m_d[None, :], D)
        b_scaled = b_ds * b_rstd[:, None]
        tl.store(p_ds + o, b_ds.to(p_ds.dtype.element_ty), mask=m_rd)
        if p_low is not None:
            tl.store(p_low + o, b_ds.to(p_low.dtype.element_ty), mask=m_rd)
        tl.store(p_scaled + o, b_scaled.to(p_scaled.dtype.element_ty), mask=m_rd)
        # w and s - e1 - d are 0 outside of the row, where ds has no meaning
        tl.store(p_mean_dn + o_r, tl.sum(b_ds * b_w[None, :], axis=1) / (4 * D), mask=m_r)
        tl.store(p_mean_n_dn + o_r, tl.sum(b_ds * (b_s - b_e1 - b_d[None, :]), axis=1) / (4 * D), mask=m_r)
        # rows past the last have dy = 0, and so ds = 0
        b_dgamma += tl.sum(b_dy * b_normalized, axis=0)
        b_dbeta += tl.sum(b_dy, axis=0)
        b_total += tl.sum(b_ds, axis=0)
        b_means += tl.sum(b_scaled * b_mean[:, None], axis=0)
    if p_part is not None:
        p_part += tl.program_id(0).to(tl.int64) * 4 * D + o_d
        tl.store(p_part, b_dgamma, mask=m_d)
        tl.store(p_part + D, b_dbeta, mask=m_d)
        tl.store(p_part + 2 * D, b_total, mask=m_d)
        tl.store(p_part + 3 * D, b_means, mask=m_d)


def forward(inputs: MlpOutInputs, outputs: MlpOutOutputs) -> None:
    """Ends the edge MLP behind its second product.

    Args:
        inputs: the product g W2'ᵀ (T, D); e1 (T, D); the row moments (T, 1) of the hidden channels; the fold's w and d
            and the norm's gamma and beta (D,).
        outputs: s = (product - mean w) rstd + d + e1 (T, D), and LayerNorm(GELU(s)) (T, D) in the accumulating type
            (full) and in that of products (low), each where it is given.
    """
    product, e1, moments, fold, norm = inputs
    launch_rows(mlp_out_forward_kernel, ROWS, e1.shape, (product, e1, *moments, *fold, *norm, *outputs))


def backward(replay: MlpOutReplay, gradients: MlpOutGradients) -> None:
    """Passes the gradient of the edges back to the second product.

    Args:
        replay: s, e1 and dy (T, D), the row moments (T, 1), the fold's w and d and the norm's gamma (D,).
        gradients: ds (T, D), which may be dy; low and scaled, which are ds and ds rstd in the products' type (T, D);
            mean_dn and mean_n_dn (T, 1), the row means of the hidden channels' dn and of dn times the normalized rows;
            sums (4, D) += Σ of dgamma, dbeta, ds, and ds rstd mean, where they are given.
    """
    s, e1, dy, moments, fold, gamma = replay
    ds, low, scaled, mean_dn, mean_n_dn, sums = gradients
    rows, dim = e1.shape
    if not e1.numel():
        return
    config = ROWS_BACKWARD
    block_r, block_d = row_block(dim, config)
    each = rows_each(rows, block_r, config.programs)
    programs = triton.cdiv(rows, each)
    part = None if sums is None else partials(gamma, programs, 4 * dim)
    same = low.dtype == ds.dtype and low.data_ptr() == ds.data_ptr()  # then ds itself is the operand
    with on_device_of(e1):
        mlp_out_backward_kernel[(programs,)](
            s,
            e1,
            dy,
            *moments,
            *fold,
            gamma,
            ds,
            None if same else low,
            scaled,
            mean_dn,
            mean_n_dn,
            part,
            rows,
            dim,
            each,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=config.warps(block_d),
        )
    if part is not None:
        add_partials(part, sums)


# -- in the epilogue of a product


@triton.jit(do_not_specialize=["T"])
def mlp_out_product_forward_kernel(
    p_g,  # (T, W)
    p_w2,  # (D, W)
    p_e1,  # (T, D)
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_w,  # (D,)
    p_d,  # (D,)
    p_s,  # (T, D)
    T,
    W: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program: a block of s = (g W2'ᵀ - mean w) rstd + d + e1, part by part. Not its norm, even where a block holds
    whole rows: that takes more registers than there are."""
    block_m, block_n = block_of(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(D, BLOCK_N), GROUP)
    o_m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_product = block_product(p_g, p_w2, o_m, o_n, T, D, W, W, 1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    b_mean = tl.load(p_mean + o_m, mask=o_m < T, other=0.0)
    b_rstd = tl.load(p_rstd + o_m, mask=o_m < T, other=0.0)
    b_parts = column_parts(b_product, PARTS)
    for k in tl.static_range(PARTS):
        first_n = block_n * BLOCK_N + k * (BLOCK_N // PARTS)
        first_m, _, o_n, m_m, m_n, o = block_places(block_m, first_n, T, D, BLOCK_M, BLOCK_N // PARTS)
        m_mn = m_m[:, None] & m_n[None, :]
        b_w = tl.load(p_w + o_n, mask=m_n, other=0.0)
        b_d = tl.load(p_d + o_n, mask=m_n, other=0.0)
        b_e1 = tl.load(p_e1 + first_m * D + o, mask=m_mn, other=0.0).to(b_w.dtype)
        b_s = (b_parts[k] - b_mean[:, None] * b_w[None, :]) * b_rstd[:, None] + b_d[None, :] + b_e1
        tl.store(p_s + first_m * D + o, b_s.to(p_s.dtype.element_ty), mask=m_mn)


def product_forward(g: Tensor, w2: Tensor, e1: Tensor, moments: RowMoments, fold: Fold, s: Tensor) -> None:
    """Forms the second product, and `forward`'s s in its epilogue.

    Args:
        g: (T, W), in fp32, bf16 or fp16.
        w2: W2' (D, W), of the same type.
        e1: (T, D).
        moments: g's row moments (T, 1).
        fold: w and d (D,).
        s: the result (T, D), as `forward` forms it of the product g W2'ᵀ, which is not stored.
    """
    (rows, dim), width = e1.shape, g.shape[1]
    if not e1.numel():
        return
    config = MLP_OUT_PRODUCT[g.itemsize]
    blocks = triton.cdiv(rows, config.block_m) * triton.cdiv(dim, config.block_n)
    with on_device_of(e1):
        mlp_out_product_forward_kernel[(blocks,)](
            g, w2, e1, *moments, *fold, s, rows, width, dim, PARTS=config.parts, **product_constants(config, width)
        )
