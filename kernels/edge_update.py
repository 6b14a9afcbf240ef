"""A layer's whole edge update in one kernel, forward: the gate, both products of the edge MLP and what follows them,
for channels of which a block holds whole rows. Neither e¹ nor its hidden vectors go through memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import EDGE_UPDATE
from gcahng.kernels.functions import NORM_EPS, gelu, inverse_root, normalized, row_moments
from gcahng.kernels.gate import DROPOUT, attention, dropout_arguments, factors, gate_sum
from gcahng.kernels.launch import on_device_of
from gcahng.kernels.mlp_in_product import forward_epilogue, merged
from gcahng.kernels.product import column_parts, columns_joined, dot_precision
from gcahng.kernels.sums import add_partials, partials
from gcahng.kernels.tiles import TILE

if TYPE_CHECKING:
    from gcahng.engine.stages.common import EdgesOut
    from gcahng.engine.stages.edge_update import EdgeUpdateSaved
    from gcahng.engine.stages.gate import GateInputs
    from gcahng.engine.weights import EdgeWeights

MAX_CHANNELS_CROWDED = 64
# What a block takes of it for 128 channels of 16 bits on compute capability 8; 8.6, 8.9 and 12.0 have 99 KB.
SHARED_MEMORY = 129 << 10
ROWS = tl.constexpr(6)  # numbers of each row that the kernel stores for itself


def takes(channels: int, itemsize: int, crowded: bool) -> bool:
    """Whether the kernel takes so many channels: where a thread has registers for its part of whole rows.

    Args:
        channels: D.
        itemsize: bytes of an operand of the products.
        crowded: whether there is no room for more beside 16-bit operands. On an A100 there is none to write h out, nor
            to form sums of an s that is stored in 16 bits. A GPU with less shared memory than SHARED_MEMORY is crowded
            too.
    """
    return channels <= (MAX_CHANNELS_CROWDED if crowded and itemsize == 2 else EDGE_UPDATE[itemsize].block_k)


@triton.jit
def places_of_ends(o_row, K, O, first, offset):
    """Of edges o_row of a tile: the places of i and j in a wrapped tensor."""
    o_class = first + o_row // (K * O * K)
    return o_class * K + o_row // (O * K) % K, (o_class + offset + o_row // K % O) * K + o_row % K


@triton.jit
def values_at(
    p_node,  # (classes + reach, K, D)
    o_node,
    o_d,
    m_d,
    D,
):
    """Rows o_node of a node tensor, channels o_d. In 32 bits: at 128 channels or fewer, 16 million nodes."""
    return tl.load(p_node + o_node[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)


@triton.jit(do_not_specialize=["T", *TILE, *DROPOUT])
def edge_update_forward_kernel(
    p_u,  # (classes + reach, K, D)
    p_c,  # (classes + reach, K)
    p_v,  # (classes + reach, K, D)
    p_gate_gamma,  # (D,)
    p_gate_beta,  # (D,)
    p_e,  # (T, D)
    p_draw,  # (1,)
    p_w1,  # (4D, D)
    p_b1,  # (4D,)
    p_w2,  # (D, 4D)
    p_w,  # (D,)
    p_d,  # (D,)
    p_gamma,  # (D,)
    p_beta,  # (D,)
    p_rows,  # (ROWS, T), the kernel's own
    p_e1,  # (T, D) or None
    p_low,  # (T, D) or None
    p_weight_i,  # (T,) or None
    p_weight_j,  # (T,) or None
    p_h,  # (T, 4D) or None
    p_mean,  # (T,) or None
    p_rstd,  # (T,) or None
    p_s,  # (T, D) or None
    p_y,  # (T, D) or None, may be e
    p_y_low,  # (T, D) or None
    p_part,  # (row blocks, 2, D) float64 or None: sums of y and y² over a block's rows
    T,
    D: tl.constexpr,
    A,
    K,
    O,
    first,
    offset,
    mirrored,
    classes,
    seed,
    layer,
    threshold,
    ROOT: tl.constexpr,
    SCALE: tl.constexpr,
    TIED: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    ENDS: tl.constexpr,
):
    """One program: BLOCK_M rows, the hidden channels BLOCK_H at a time."""
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # in 32 bits: to spare registers
    o_d = tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < T, o_d < D
    m_md = m_m[:, None] & m_d[None, :]
    # Rows past the last take its nodes, which spares masks.
    o_i, o_j = places_of_ends(tl.minimum(o_m, T - 1), K, O, first, offset)
    o = first_m * D + tl.arange(0, BLOCK_M)[:, None] * D + o_d[None, :]
    b_e = tl.load(p_e + o, mask=m_md, other=0.0).to(tl.float32)
    b_c = tl.load(p_c + o_i) - tl.load(p_c + o_j)
    b_weight_i, b_weight_j = attention(
        b_e, values_at(p_u, o_i, o_d, m_d, D), values_at(p_u, o_j, o_d, m_d, D), b_c, ROOT
    )
    if p_weight_i is not None:
        tl.store(p_weight_i + o_m, b_weight_i, mask=m_m)
        tl.store(p_weight_j + o_m, b_weight_j, mask=m_m)
    b_mask_i, b_mask_j = factors(o_i, o_j, classes * K, seed, layer, threshold, p_draw, SCALE, TIED, DROP, tl.float32)
    b_masked_i, b_masked_j = b_weight_i * b_mask_i, b_weight_j * b_mask_j
    b_t = gate_sum(b_e, b_masked_i, values_at(p_v, o_i, o_d, m_d, D), b_masked_j, values_at(p_v, o_j, o_d, m_d, D))
    b_a = gelu(b_t)
    b_of_a, b_of_a_rstd = row_moments(b_a, m_d[None, :], D)
    # The residual is formed again behind the products: beside them there are no registers for it, nor for these.
    b_rows = (
        b_masked_i,
        b_masked_j,
        b_of_a,
        b_of_a_rstd,
        o_i.to(tl.float32, bitcast=True),
        o_j.to(tl.float32, bitcast=True),
    )
    for k in tl.static_range(ROWS):
        tl.store(p_rows + k * T + o_m, b_rows[k], mask=m_m)
    tl.debug_barrier()  # other threads of the program load them
    b_gamma = tl.load(p_gate_gamma + o_d, mask=m_d, other=0.0)
    b_beta = tl.load(p_gate_beta + o_d, mask=m_d, other=0.0)
    b_full = normalized(b_a, b_of_a, b_of_a_rstd, b_gamma, b_beta)
    b_e1 = b_full.to(p_w1.dtype.element_ty)
    if p_e1 is not None:
        tl.store(p_e1 + o, b_full.to(p_e1.dtype.element_ty), mask=m_md)
    if p_low is not None:
        tl.store(p_low + o, b_e1, mask=m_md)
    EDGES: tl.constexpr = p_e.dtype.element_ty
    b_s = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_square = tl.zeros((BLOCK_M,), dtype=tl.float32)
    W: tl.constexpr = 4 * D
    o_w1 = o_d[:, None] + tl.arange(0, BLOCK_H)[None, :] * D
    o_w2 = tl.arange(0, BLOCK_H)[:, None] + o_d[None, :] * W
    for first_h in range(0, W, BLOCK_H):
        o_h = first_h + tl.arange(0, BLOCK_H)
        p_block = p_w1 + first_h * D + o_w1
        b_w1 = tl.load(p_block) if EVEN else tl.load(p_block, mask=m_d[:, None] & (o_h < W)[None, :], other=0.0)
        b_h = tl.dot(b_e1, b_w1, input_precision=PRECISION)
        b_parts, b_gs = column_parts(b_h, PARTS), ()
        for k in tl.static_range(PARTS):
            first_part = first_h + k * (BLOCK_H // PARTS)
            b_g, b_part, b_part_square, count = forward_epilogue(
                b_parts[k],
                tl.program_id(0),
                first_part,
                p_b1,
                p_h,
                None,
                T,
                W,
                p_w1.dtype.element_ty,
                EVEN,
                BLOCK_M,
                BLOCK_H // PARTS,
            )
            b_mean, b_square = merged(b_mean, b_square, 1.0 * first_part, b_part, b_part_square, count)
            b_gs = b_gs + (b_g,)
        p_block = p_w2 + first_h + o_w2
        b_w2 = tl.load(p_block) if EVEN else tl.load(p_block, mask=(o_h < W)[:, None] & m_d[None, :], other=0.0)
        b_s = tl.dot(columns_joined(b_gs, PARTS), b_w2, b_s, input_precision=PRECISION)
    b_rstd = inverse_root(b_square / W + NORM_EPS)
    if p_mean is not None:
        tl.store(p_mean + o_m, b_mean, mask=m_m)
        tl.store(p_rstd + o_m, b_rstd, mask=m_m)
    b_rows = ()
    for k in tl.static_range(ROWS):
        b_rows = b_rows + (tl.load(p_rows + k * T + o_m, mask=m_m, other=0.0),)
    b_masked_i, b_masked_j, b_of_a, b_of_a_rstd, b_i, b_j = b_rows
    o_i, o_j = b_i.to(tl.int32, bitcast=True), b_j.to(tl.int32, bitcast=True)
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
        b_e = tl.load(p_e + o, mask=m_mpart, other=0.0).to(tl.float32)
        b_v_i, b_v_j = values_at(p_v, o_i, o_part, m_part, D), values_at(p_v, o_j, o_part, m_part, D)
        b_gamma = tl.load(p_gate_gamma + o_part, mask=m_part, other=0.0)
        b_beta = tl.load(p_gate_beta + o_part, mask=m_part, other=0.0)
        b_a = gelu(gate_sum(b_e, b_masked_i, b_v_i, b_masked_j, b_v_j))
        b_full = normalized(b_a, b_of_a, b_of_a_rstd, b_gamma, b_beta).to(EDGES).to(tl.float32)
        b_w = tl.load(p_w + o_part, mask=m_part, other=0.0)
        b_d = tl.load(p_d + o_part, mask=m_part, other=0.0)
        b_t = (b_parts[k] - b_mean[:, None] * b_w[None, :]) * b_rstd[:, None] + b_d[None, :] + b_full
        b_stored = b_t.to(EDGES if p_s is None else p_s.dtype.element_ty)
        if p_s is not None:
            tl.store(p_s + o, b_stored, mask=m_mpart)
        b_g = gelu(b_stored.to(tl.float32))  # what goes on is what is stored
        count = tl.minimum(tl.maximum(D - first_d, 0), BLOCK_D // ENDS).to(tl.float32)
        b_part = tl.sum(tl.where(m_part[None, :], b_g, 0.0), axis=1) / tl.maximum(count, 1.0)
        b_centered = tl.where(m_part[None, :], b_g - b_part[:, None], 0.0)
        b_of_g, b_of_g_square = merged(
            b_of_g, b_of_g_square, 1.0 * first_d, b_part, tl.sum(b_centered * b_centered, axis=1), count
        )
        b_gs = b_gs + (b_g,)
    b_rstd = inverse_root(b_of_g_square / D + NORM_EPS)
    tl.debug_barrier()  # y may be e
    for k in tl.static_range(ENDS):
        o_part = k * (BLOCK_D // ENDS) + tl.arange(0, BLOCK_D // ENDS)
        m_part = o_part < D
        m_mpart = m_m[:, None] & m_part[None, :]
        o = first_m * D + tl.arange(0, BLOCK_M)[:, None] * D + o_part[None, :]
        b_gamma = tl.load(p_gamma + o_part, mask=m_part, other=0.0)
        b_beta = tl.load(p_beta + o_part, mask=m_part, other=0.0)
        b_y = normalized(b_gs[k], b_of_g, b_rstd, b_gamma, b_beta)
        if p_y is not None:
            tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=m_mpart)
        if p_y_low is not None:
            tl.store(p_y_low + o, b_y.to(p_y_low.dtype.element_ty), mask=m_mpart)
        if p_part is not None:
            # In float64, as head_moments_kernel: variances are differences of these sums.
            b_wide = tl.where(m_m[:, None], b_y.to(EDGES).to(tl.float32), 0.0).to(tl.float64)
            b_weighted = tl.where(o_m // K % O >= mirrored, 2.0, 1.0)[:, None] * b_wide
            o_sum = tl.program_id(0).to(tl.int64) * 2 * D + o_part
            tl.store(p_part + o_sum, tl.sum(b_weighted, axis=0), mask=m_part)
            tl.store(p_part + o_sum + D, tl.sum(b_weighted * b_wide, axis=0), mask=m_part)


def forward(
    gate: GateInputs,
    weights: EdgeWeights,
    rows: Tensor,
    saved: EdgeUpdateSaved,
    out: EdgesOut,
    sums: Tensor | None,
) -> None:
    """Passes a tile's edges through the gate and the edge MLP. Products in fp32, bf16 or fp16, as `takes` says.

    Args:
        gate: as gate.forward takes it.
        weights: the edge MLP, W2 and b2 with the hidden channels' norm folded into them, and the norm behind it.
        rows: memory for the kernel (ROWS, T), undefined before and after.
        saved: what of the following is stored, for the backward: e1, low and the attention weights as gate.forward
            leaves them; h = e1 W1ᵀ (T, 4D); the row moments (T, 1) of g = GELU(h + b1); s = (g W2'ᵀ - mean w) rstd + d
            + e1 (T, D), which goes on as it was stored.
        out: the new edges LayerNorm(GELU(s)) (T, D) in the accumulating type, which may be e, and in that of products,
            each where it is given.
        sums: (2, D) float64 += Σ y and Σ y² of the new edges y, over the ordered pairs that the tile stands for.
    """
    tile, dropout, scale, draw, tokens, norm, e = gate
    count, channels = e.shape
    if not count:
        return
    config = EDGE_UPDATE[weights.w1.itemsize]
    blocks, block_d = triton.cdiv(count, config.block_m), max(16, triton.next_power_of_2(channels))
    part = None if sums is None else partials(e, blocks, 2 * channels, torch.float64)
    numbers, constants = dropout_arguments(dropout, scale)
    mean, rstd = saved.moments or (None, None)
    with on_device_of(e):
        edge_update_forward_kernel[(blocks,)](
            *tokens,
            *norm,
            e,
            draw,
            *weights,
            rows,
            saved.e1,
            saved.low,
            saved.weight_i,
            saved.weight_j,
            saved.h,
            mean,
            rstd,
            saved.s,
            *out,
            part,
            count,
            channels,
            *tile,
            *numbers,
            ROOT=channels**-0.5,
            **constants,
            PRECISION=dot_precision(),
            EVEN=channels == block_d and 4 * channels % config.block_n == 0,
            BLOCK_M=config.block_m,
            BLOCK_H=config.block_n,
            BLOCK_D=block_d,
            PARTS=config.parts,
            ENDS=config.joined,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if part is not None:
        add_partials(part, sums)
