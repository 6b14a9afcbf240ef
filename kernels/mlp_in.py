"""The hidden layer of the edge MLP: bias, GELU and row moments behind the first product, and its backward between two
products; and the launchers of both in the epilogue of the product before them (kernels in mlp_in_product.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import (
    MLP_IN,
    MLP_IN_PRODUCT,
    MLP_IN_PRODUCT_BACKWARD,
    MLP_IN_PRODUCT_STORED,
    ROWS_BACKWARD,
)
from gcahng.kernels.functions import gelu, hidden_vjp, row_moments
from gcahng.kernels.launch import launch_rows, on_device_of, rows_at
from gcahng.kernels.mlp_in_product import (
    merge_moments_kernel,
    mlp_in_product_backward_kernel,
    mlp_in_product_forward_kernel,
)

if TYPE_CHECKING:
    from gcahng.engine.stages.mlp_in import MlpInGradients, MlpInInputs, MlpInOutputs, MlpInUpstream, NormRows
from gcahng.kernels.product import product_constants
from gcahng.kernels.sums import add_partials, partials, rows_each

_BACKWARD_COLUMNS = 512
_MERGED_ROWS = 128


@triton.jit(do_not_specialize=["T"])
def mlp_in_forward_kernel(
    p_h,  # (T, W)
    p_bias,  # (W,)
    p_g,  # (T, W), may be h
    p_mean,  # (T,)
    p_rstd,  # (T,)
    T,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R rows of at most BLOCK_D channels. The moments are those of g as it is stored."""
    o_w = tl.arange(0, BLOCK_D)
    m_w = o_w < W
    o_r, m_r, o, m_rw = rows_at(tl.program_id(0).to(tl.int64) * BLOCK_R, o_w, T, W, BLOCK_R)
    b_bias = tl.load(p_bias + o_w, mask=m_w, other=0.0)
    b_h = tl.load(p_h + o, mask=m_rw, other=0.0)
    b_g = gelu(b_h.to(b_bias.dtype) + b_bias[None, :]).to(p_g.dtype.element_ty)
    tl.store(p_g + o, b_g, mask=m_rw)
    b_mean, b_rstd = row_moments(tl.where(m_w[None, :], b_g.to(b_bias.dtype), 0.0), m_w[None, :], W)
    tl.store(p_mean + o_r, b_mean, mask=m_r)
    tl.store(p_rstd + o_r, b_rstd, mask=m_r)


@triton.jit(do_not_specialize=["T", "rows"])
def mlp_in_backward_kernel(
    p_h,  # (T, W)
    p_bias,  # (W,)
    p_dn,  # (T, W)
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_mean_dn,  # (T,)
    p_mean_n_dn,  # (T,)
    p_g,  # (T, W), may be h
    p_dh,  # (T, W), may be dn
    p_part,  # (P, W) or None: sums of dh over a program's rows
    T,
    W: tl.constexpr,
    rows,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program: `rows` rows, BLOCK_R at a time, and BLOCK_W columns."""
    first_row = tl.program_id(0).to(tl.int64) * rows
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_w = o_w < W
    b_bias = tl.load(p_bias + o_w, mask=m_w, other=0.0)
    b_sum = tl.zeros((BLOCK_R, BLOCK_W), dtype=b_bias.dtype)
    for first in range(0, rows, BLOCK_R):
        o_r, m_r, o, m_rw = rows_at(first_row + first, o_w, T, W, BLOCK_R)
        b_h = tl.load(p_h + o, mask=m_rw, other=0.0)
        b_dn = tl.load(p_dn + o, mask=m_rw, other=0.0)
        b_mean = tl.load(p_mean + o_r, mask=m_r, other=0.0)
        b_rstd = tl.load(p_rstd + o_r, mask=m_r, other=0.0)
        b_mean_dn = tl.load(p_mean_dn + o_r, mask=m_r, other=0.0)
        b_mean_n_dn = tl.load(p_mean_n_dn + o_r, mask=m_r, other=0.0)
        b_g, b_dh = hidden_vjp(b_h, b_bias, b_dn, b_mean, b_rstd, b_mean_dn, b_mean_n_dn, p_g.dtype.element_ty)
        tl.store(p_g + o, b_g, mask=m_rw)
        tl.store(p_dh + o, b_dh.to(p_dh.dtype.element_ty), mask=m_rw)
        b_sum += b_dh  # rows past the last have rstd = 0, and so dh = 0
    if p_part is not None:
        tl.store(p_part + tl.program_id(0).to(tl.int64) * W + o_w, tl.sum(b_sum, axis=0), mask=m_w)


def forward(inputs: MlpInInputs, outputs: MlpInOutputs) -> None:
    """Forms the hidden layer behind the first product.

    Args:
        inputs: the product h (T, W) without its bias (W,).
        outputs: g = GELU(h + bias) (T, W), which may be h, and the row moments mean and rstd (T, 1) of g as stored.
    """
    launch_rows(mlp_in_forward_kernel, MLP_IN, inputs.h.shape, (*inputs, *outputs))


def backward(inputs: MlpInInputs, upstream: MlpInUpstream, rows: NormRows, gradients: MlpInGradients) -> None:
    """Passes the gradient back through the hidden layer, between two products.

    Args:
        inputs: as `forward` had them.
        upstream: dn (T, W), the gradient of the normalized rows.
        rows: the row moments, and the row means of dn and of dn times the normalized rows (T, 1).
        gradients: g (T, W) again, which may be h; dh (T, W), which may be dn; db (W,) += Σ dh, where it is given.
    """
    count, width = inputs.h.shape
    if not inputs.h.numel():
        return
    config, (g, dh, db) = ROWS_BACKWARD, gradients
    block_w = min(triton.next_power_of_2(width), _BACKWARD_COLUMNS)
    block_r = max(1, config.values // block_w)
    columns = triton.cdiv(width, block_w)
    each = rows_each(count, block_r, triton.cdiv(config.programs, columns))
    part = None if db is None else partials(inputs.bias, triton.cdiv(count, each), width)
    with on_device_of(g):
        mlp_in_backward_kernel[(triton.cdiv(count, each), columns)](
            *inputs,
            *upstream,
            *rows,
            g,
            dh,
            part,
            count,
            width,
            each,
            BLOCK_R=block_r,
            BLOCK_W=block_w,
            num_warps=config.num_warps,
        )
    if part is not None:
        add_partials(part, db)


# -- in the epilogue of a product


def product_forward(e1: Tensor, w1: Tensor, b1: Tensor, h: Tensor | None, outputs: MlpInOutputs) -> None:
    """Forms the first product, and the hidden layer in its epilogue.

    Args:
        e1: (T, D), in fp32, bf16 or fp16.
        w1: (W, D), of the same type.
        b1: the bias (W,), in the accumulating type.
        h: e1 W1ᵀ (T, W), stored where it is given.
        outputs: as those of `forward`.
    """
    (rows, dim), width = e1.shape, w1.shape[0]
    if not outputs.g.numel():
        return
    g, mean, rstd = outputs
    config = (MLP_IN_PRODUCT if h is None else MLP_IN_PRODUCT_STORED)[e1.itemsize]
    blocks = triton.cdiv(width, config.block_n)
    joined = config.block_n // config.parts * config.joined  # columns whose moments come as one
    means, squares = torch.empty(2, blocks * config.block_n // joined, rows, dtype=mean.dtype, device=mean.device)
    with on_device_of(e1):
        mlp_in_product_forward_kernel[(triton.cdiv(rows, config.block_m) * blocks,)](
            e1,
            w1,
            b1,
            h,
            g,
            means,
            squares,
            rows,
            dim,
            width,
            PARTS=config.parts,
            JOINED=config.joined,
            **product_constants(config, dim),
        )
        merge_moments_kernel[(triton.cdiv(rows, _MERGED_ROWS),)](
            means, squares, mean, rstd, rows, width, BLOCK_N=joined, BLOCK_R=_MERGED_ROWS, num_warps=4
        )


def product_backward(ds: Tensor, w2: Tensor, inputs: MlpInInputs, rows: NormRows, gradients: MlpInGradients) -> None:
    """Forms dn = ds W2', which is not stored, and `backward` of it in the product's epilogue.

    Args:
        ds: (T, D), in fp32, bf16 or fp16.
        w2: W2' (D, W), of the same type.
        inputs: as those of `backward`.
        rows: as those of `backward`.
        gradients: as those of `backward`.
    """
    (count, dim), width = ds.shape, w2.shape[1]
    g, dh, db = gradients
    if not g.numel():
        return
    config = MLP_IN_PRODUCT_BACKWARD[ds.itemsize]
    blocks_m, blocks_n = triton.cdiv(count, config.block_m), triton.cdiv(width, config.block_n)
    part = None if db is None else partials(inputs.bias, blocks_m, width)
    with on_device_of(ds):
        mlp_in_product_backward_kernel[(blocks_m * blocks_n,)](
            ds,
            w2,
            *inputs,
            *rows,
            g,
            dh,
            part,
            count,
            dim,
            width,
            PARTS=config.parts,
            **product_constants(config, dim),
        )
    if part is not None:
        add_partials(part, db)
