"""The coefficient head beside its product: BatchNorm's moments, sigmoid, and their backwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import HEAD
from gcahng.kernels.functions import logistic
from gcahng.kernels.launch import compute_type, on_device_of
from gcahng.kernels.sums import add_partials, partials, rows_each
from gcahng.kernels.tiles import TILE, Tile


@triton.jit(do_not_specialize=["T", "rows", *TILE])
def head_moments_kernel(
    p_e,  # (A, K, O, K, D)
    p_part,  # (P, 2, D) float64: sums of e and e² over a program's rows
    T,
    D,
    K,
    O,
    mirrored,
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
    for first in range(0, rows, BLOCK_R):
        o_r = tl.program_id(0).to(tl.int64) * rows + first + tl.arange(0, BLOCK_R)
        m_rd = (o_r < T)[:, None] & m_d[None, :]
        b_e = tl.load(p_e + o_r[:, None] * D + o_d[None, :], mask=m_rd, other=0.0).to(tl.float64)
        b_weighted = tl.where(o_r // K % O >= mirrored, 2.0, 1.0)[:, None] * b_e
        b_sum += b_weighted
        b_square += b_weighted * b_e
    p_part += tl.program_id(0).to(tl.int64) * 2 * D + o_d
    tl.store(p_part, tl.sum(b_sum, axis=0), mask=m_d)
    tl.store(p_part + D, tl.sum(b_square, axis=0), mask=m_d)


@triton.jit(do_not_specialize=["T"])
def head_forward_kernel(
    p_p,  # (T, D)
    p_bias,  # (D,)
    p_theta,  # (T, D)
    T,
    D,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R rows, BLOCK_D channels."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_rd = (o_r < T)[:, None] & m_d[None, :]
    o = o_r[:, None] * D + o_d[None, :]
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
    b_p = tl.load(p_p + o, mask=m_rd, other=0.0).to(COMPUTE) + b_bias[None, :]
    tl.store(p_theta + o, logistic(b_p), mask=m_rd)


@triton.jit(do_not_specialize=["T", "rows"])
def head_backward_kernel(
    p_theta,  # (T, D)
    p_dtheta,  # (T, D)
    p_dpre,  # (T, D)
    p_part,  # (P, D) or None: sums of dpre over a program's rows
    T,
    D,
    rows,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: `rows` rows, BLOCK_R at a time, BLOCK_D channels."""
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_sum = tl.zeros((BLOCK_R, BLOCK_D), dtype=COMPUTE)
    for first in range(0, rows, BLOCK_R):
        o_r = tl.program_id(0).to(tl.int64) * rows + first + tl.arange(0, BLOCK_R)
        m_rd = (o_r < T)[:, None] & m_d[None, :]
        o = o_r[:, None] * D + o_d[None, :]
        b_theta = tl.load(p_theta + o, mask=m_rd, other=0.0)
        b_dpre = tl.load(p_dtheta + o, mask=m_rd, other=0.0) * b_theta * (1.0 - b_theta)
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
    D,
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
    for first in range(0, rows, BLOCK_R):
        o_r = tl.program_id(0).to(tl.int64) * rows + first + tl.arange(0, BLOCK_R)
        m_rd = (o_r < T)[:, None] & m_d[None, :]
        o = o_r[:, None] * D + o_d[None, :]
        b_dy = tl.load(p_dy + o, mask=m_rd, other=0.0).to(COMPUTE)
        tl.store(p_wide + o, b_dy, mask=m_rd)
        b_sum += b_dy
        b_along += b_dy * tl.load(p_e + o, mask=m_rd, other=0.0)
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
    D,
    K,
    O,
    mirrored,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R rows, BLOCK_D channels."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_rd = (o_r < T)[:, None] & m_d[None, :]
    o = o_r[:, None] * D + o_d[None, :]
    b_scale = tl.load(p_scale + o_d, mask=m_d, other=0.0)
    b_a = tl.load(p_a + o_d, mask=m_d, other=0.0)
    b_b = tl.load(p_b + o_d, mask=m_d, other=0.0)
    b_dy = tl.load(p_dy + o, mask=m_rd, other=0.0)
    b_through = b_a[None, :] + b_b[None, :] * tl.load(p_e + o, mask=m_rd, other=0.0)
    b_through *= tl.where(o_r // K % O >= mirrored, 2.0, 1.0)[:, None]
    tl.store(p_de + o, b_scale[None, :] * (b_dy - b_through), mask=m_rd)


def _grid(rows: int, each: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(rows, each), triton.cdiv(channels, HEAD.block_channels)


def _blocks() -> dict[str, int]:
    return {"BLOCK_R": HEAD.block_rows, "BLOCK_D": HEAD.block_channels, "num_warps": HEAD.num_warps}


def moments(tile: Sequence[int], e: Tensor, sums: Tensor) -> None:
    """sums (2, D) float64 += Σ e and Σ e² over the ordered pairs that a tile of e (T, D) stands for."""
    tile, (rows, channels) = Tile(*tile), e.shape
    each = rows_each(rows, HEAD.block_rows, HEAD.programs)
    grid = _grid(rows, each, channels)
    part = partials(e, grid[0], 2 * channels, torch.float64)
    with on_device_of(e):
        head_moments_kernel[grid](e, part, rows, channels, tile.K, tile.O, tile.mirrored, each, **_blocks())
    add_partials(part, sums.view(-1))


def forward(p: Tensor, b: Tensor, theta: Tensor) -> None:
    """p (T, D) → theta = sigmoid(p + b) (T, D)."""
    rows, channels = p.shape
    with on_device_of(p):
        head_forward_kernel[_grid(rows, HEAD.block_rows, channels)](
            p, b, theta, rows, channels, COMPUTE=compute_type(b.dtype), **_blocks()
        )


def backward(theta: Tensor, dtheta: Tensor, dpre: Tensor, sum: Tensor | None) -> None:
    """theta, dtheta (T, D) → dpre (T, D), sum (D) += Σ dpre."""
    rows, channels = theta.shape
    each = rows_each(rows, HEAD.block_rows, HEAD.programs)
    grid = _grid(rows, each, channels)
    part = None if sum is None else partials(theta, grid[0], channels)
    with on_device_of(theta):
        head_backward_kernel[grid](
            theta, dtheta, dpre, part, rows, channels, each, COMPUTE=compute_type(theta.dtype), **_blocks()
        )
    if part is not None:
        add_partials(part, sum)


def sums(dy: Tensor, e: Tensor, wide: Tensor, sums: Tensor) -> None:
    """dy (T, D) → wide, the same in e's type; sums (2, D) += Σ dy and Σ dy ∘ e."""
    rows, channels = e.shape
    each = rows_each(rows, HEAD.block_rows, HEAD.programs)
    grid = _grid(rows, each, channels)
    part = partials(e, grid[0], 2 * channels)
    with on_device_of(e):
        head_sums_kernel[grid](dy, e, wide, part, rows, channels, each, COMPUTE=compute_type(e.dtype), **_blocks())
    add_partials(part, sums.view(-1))


def norm(tile: Sequence[int], dy: Tensor, e: Tensor, scale: Tensor, a: Tensor, b: Tensor, de: Tensor) -> None:
    """dy (T, D) → de = scale (dy - weight (a + b e)), which may be dy; the weight of a mirrored edge is 2."""
    tile, (rows, channels) = Tile(*tile), e.shape
    with on_device_of(e):
        head_norm_kernel[_grid(rows, HEAD.block_rows, channels)](
            dy, e, scale, a, b, de, rows, channels, tile.K, tile.O, tile.mirrored, **_blocks()
        )
