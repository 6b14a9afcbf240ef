"""The coefficient head beside its product: BatchNorm's moments, sigmoid, and their backwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import HEAD
from gcahng.kernels.functions import logistic
from gcahng.kernels.launch import compute_type, on_device_of, rows_at
from gcahng.kernels.sums import add_partials, partials, rows_each
from gcahng.kernels.tiles import TILE

if TYPE_CHECKING:
    from gcahng.engine.stages.head import HeadBackward, HeadForward, HeadMoments, HeadNorm, HeadSums


@triton.jit(do_not_specialize=["T", "rows", *TILE])
def head_moments_kernel(
    p_e,  # (A, K, O, K, D)
    p_part,  # (P, 2, D) float64: sums of e and e² over a program's rows
    T,
    D: tl.constexpr,
    A,
    K,
    O,
    first,
    offset,
    mirrored,
    classes,
    rows,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: `rows` rows, BLOCK_R at a time, BLOCK_D channels."""
    # In float64: variances are differences of these sums, and edges may lie far from 0 for their spread.
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_sum = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float64)
    b_square = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float64)
    for start in range(0, rows, BLOCK_R):
        o_r, _, o, m_rd = rows_at(tl.program_id(0).to(tl.int64) * rows + start, o_d, T, D, BLOCK_R)
        b_e = tl.load(p_e + o, mask=m_rd, other=0.0).to(tl.float64)
        b_weighted = tl.where(o_r.to(tl.int32) // K % O >= mirrored, 2.0, 1.0)[:, None] * b_e
        b_sum += b_weighted
        b_square += b_weighted * b_e
    p_part += tl.program_id(0).to(tl.int64) * 2 * D + o_d
    tl.store(p_part, tl.sum(b_sum, axis=0), mask=m_d)
    tl.store(p_part + D, tl.sum(b_square, axis=0), mask=m_d)


@triton.jit(do_not_specialize=["T"])
def head_forward_kernel(
    p_product,  # (T, D)
    p_bias,  # (D,)
    p_theta,  # (T, D)
    T,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R rows, BLOCK_D channels."""
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    _, _, o, m_rd = rows_at(tl.program_id(0).to(tl.int64) * BLOCK_R, o_d, T, D, BLOCK_R)
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
    b_x = tl.load(p_product + o, mask=m_rd, other=0.0).to(COMPUTE) + b_bias[None, :]
    tl.store(p_theta + o, logistic(b_x).to(p_theta.dtype.element_ty), mask=m_rd)


@triton.jit(do_not_specialize=["T", "rows"])
def head_backward_kernel(
    p_theta,  # (T, D)
    p_dtheta,  # (T, D)
    p_dpre,  # (T, D)
    p_part,  # (P, D) or None: sums of dpre over a program's rows
    T,
    D: tl.constexpr,
    rows,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: `rows` rows, BLOCK_R at a time, BLOCK_D channels."""
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_sum = tl.zeros((BLOCK_R, BLOCK_D), dtype=COMPUTE)
    for start in range(0, rows, BLOCK_R):
        _, _, o, m_rd = rows_at(tl.program_id(0).to(tl.int64) * rows + start, o_d, T, D, BLOCK_R)
        b_theta = tl.load(p_theta + o, mask=m_rd, other=0.0).to(COMPUTE)
        b_dpre = tl.load(p_dtheta + o, mask=m_rd, other=0.0).to(COMPUTE) * b_theta * (1.0 - b_theta)
        tl.store(p_dpre + o, b_dpre.to(p_dpre.dtype.element_ty), mask=m_rd)
        b_sum += b_dpre
    if p_part is not None:
        tl.store(p_part + tl.program_id(0).to(tl.int64) * D + o_d, tl.sum(b_sum, axis=0), mask=m_d)


@triton.jit(do_not_specialize=["T", "rows"])
def head_sums_kernel(
    p_dy,  # (T, D)
    p_e,  # (T, D)
    p_wide,  # (T, D)
    p_part,  # (P, 2, D): sums of dy and dy ∘ e over a program's rows
    T,
    D: tl.constexpr,
    rows,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: `rows` rows, BLOCK_R at a time, BLOCK_D channels."""
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_sum = tl.zeros((BLOCK_R, BLOCK_D), dtype=COMPUTE)
    b_along = tl.zeros((BLOCK_R, BLOCK_D), dtype=COMPUTE)
    for start in range(0, rows, BLOCK_R):
        _, _, o, m_rd = rows_at(tl.program_id(0).to(tl.int64) * rows + start, o_d, T, D, BLOCK_R)
        b_dy = tl.load(p_dy + o, mask=m_rd, other=0.0).to(COMPUTE)
        tl.store(p_wide + o, b_dy.to(p_wide.dtype.element_ty), mask=m_rd)
        b_sum += b_dy
        b_along += b_dy * tl.load(p_e + o, mask=m_rd, other=0.0).to(COMPUTE)
    p_part += tl.program_id(0).to(tl.int64) * 2 * D + o_d
    tl.store(p_part, tl.sum(b_sum, axis=0), mask=m_d)
    tl.store(p_part + D, tl.sum(b_along, axis=0), mask=m_d)


@triton.jit(do_not_specialize=["T", *TILE])
def head_norm_kernel(
    p_dy,  # (A, K, O, K, D)
    p_e,  # (A, K, O, K, D)
    p_scale,  # (D,)
    p_a,  # (D,)
    p_b,  # (D,)
    p_de,  # (A, K, O, K, D), may be dy
    T,
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
    """One program: BLOCK_R rows, BLOCK_D channels."""
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_r, _, o, m_rd = rows_at(tl.program_id(0).to(tl.int64) * BLOCK_R, o_d, T, D, BLOCK_R)
    b_scale = tl.load(p_scale + o_d, mask=m_d, other=0.0)
    b_a = tl.load(p_a + o_d, mask=m_d, other=0.0)
    b_b = tl.load(p_b + o_d, mask=m_d, other=0.0)
    b_dy = tl.load(p_dy + o, mask=m_rd, other=0.0).to(b_scale.dtype)
    b_through = b_a[None, :] + b_b[None, :] * tl.load(p_e + o, mask=m_rd, other=0.0).to(b_scale.dtype)
    b_through *= tl.where(o_r.to(tl.int32) // K % O >= mirrored, 2.0, 1.0)[:, None]
    b_de = b_scale[None, :] * (b_dy - b_through)
    tl.store(p_de + o, b_de.to(p_de.dtype.element_ty), mask=m_rd)


def _launch(
    kernel: Any,
    shape: tuple[int, int],
    each: int,
    pointers: tuple[Tensor | None, ...],
    numbers: tuple[int, ...] = (),
    **constants: Any,
) -> None:
    """Launches a kernel whose programs take `each` of the rows and a block of channels of a tensor of that shape."""
    rows, channels = shape
    grid = (triton.cdiv(rows, each), triton.cdiv(channels, HEAD.block_channels))
    with on_device_of(pointers[0]):
        kernel[grid](
            *pointers,
            rows,
            channels,
            *numbers,
            BLOCK_R=HEAD.block_rows,
            BLOCK_D=HEAD.block_channels,
            num_warps=HEAD.num_warps,
            **constants,
        )


def _summed(rows: int) -> tuple[int, int]:
    """Where rows are summed: how many of them a program takes, and how many programs there are."""
    each = rows_each(rows, HEAD.block_rows, HEAD.programs)
    return each, triton.cdiv(rows, each)


def moments(arguments: HeadMoments) -> None:
    """Adds a tile's edges to BatchNorm's sums.

    Args:
        arguments: the tile, its edges e (T, D), and sums (2, D) float64 += Σ e and Σ e² over the ordered pairs that the
            tile stands for.
    """
    tile, e, sums = arguments
    each, programs = _summed(e.shape[0])
    part = partials(e, programs, 2 * e.shape[1], torch.float64)
    _launch(head_moments_kernel, e.shape, each, (e, part), (*tile, each))
    add_partials(part, sums.view(-1))


def forward(arguments: HeadForward) -> None:
    """Forms coefficients behind the head's product.

    Args:
        arguments: the product (T, D) without the bias (D,), and theta = sigmoid(product + bias) (T, D).
    """
    product, bias, theta = arguments
    constants = {"COMPUTE": compute_type(bias.dtype)}
    _launch(head_forward_kernel, product.shape, HEAD.block_rows, (product, bias, theta), **constants)


def backward(arguments: HeadBackward) -> None:
    """Forms the gradient before the sigmoid.

    Args:
        arguments: theta and dtheta (T, D); dpre (T, D), their gradient before the sigmoid, in the products' type; sum
            (D,) += Σ dpre, where it is given.
    """
    theta, dtheta, dpre, total = arguments
    each, programs = _summed(theta.shape[0])
    part = None if total is None else partials(total, programs, theta.shape[1])
    pointers, constants = (theta, dtheta, dpre, part), {"COMPUTE": compute_type(theta.dtype)}
    _launch(head_backward_kernel, theta.shape, each, pointers, (each,), **constants)
    if part is not None:
        add_partials(part, total)


def sums(arguments: HeadSums) -> None:
    """Forms the sums that BatchNorm's backward needs.

    Args:
        arguments: dy (T, D) in the products' type; the edges e (T, D); wide (T, D), dy in e's type; sums (2, D) += Σ dy
            and Σ dy ∘ e.
    """
    dy, e, wide, total = arguments
    each, programs = _summed(e.shape[0])
    part = partials(total, programs, 2 * e.shape[1])
    pointers, constants = (dy, e, wide, part), {"COMPUTE": compute_type(total.dtype)}
    _launch(head_sums_kernel, e.shape, each, pointers, (each,), **constants)
    add_partials(part, total.view(-1))


def norm(arguments: HeadNorm) -> None:
    """Passes the gradient back through BatchNorm.

    Args:
        arguments: the tile; dy and the edges e (T, D); scale, a and b (D,); de = scale (dy - weight (a + b e)) (T, D),
            which may be dy. The weight of an edge that stands for both directions is 2.
    """
    tile, dy, e, scale, a, b, de = arguments
    _launch(head_norm_kernel, e.shape, HEAD.block_rows, (dy, e, scale, a, b, de), tuple(tile))
