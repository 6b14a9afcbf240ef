"""1 - cos of negatives and their anchors, and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import SIMILARITY
from gcahng.kernels.launch import compute_type, on_device_of


@triton.jit
def similarity_kernel(
    p_anchors,  # (n, D)
    p_node,  # (N,) int64
    p_negatives,  # (N, D)
    p_counted,  # (N,) bool
    p_loss,  # (N,)
    p_dn,  # (N, D)
    N,
    D,
    p_scale,  # (1,)
    COMPUTE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R rows, whole."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_r = o_r < N
    m_rd = m_r[:, None] & (o_d < D)[None, :]
    b_counted = tl.load(p_counted + o_r, mask=m_r, other=0) != 0
    b_node = tl.load(p_node + o_r, mask=m_r, other=0)
    b_a = tl.load(p_anchors + b_node[:, None] * D + o_d[None, :], mask=m_rd, other=0.0)
    b_x = tl.load(p_negatives + o_r[:, None] * D + o_d[None, :], mask=m_rd, other=0.0)
    b_norm_a = tl.maximum(tl.sqrt(tl.sum(b_a * b_a, axis=1)), 1e-8)
    b_norm_x = tl.maximum(tl.sqrt(tl.sum(b_x * b_x, axis=1)), 1e-8)
    b_cosine = tl.sum(b_a * b_x, axis=1) / (b_norm_a * b_norm_x)
    tl.store(p_loss + o_r, tl.where(b_counted, 1.0 - b_cosine, 0.0), mask=m_r)
    if GRADIENT:
        b_along = tl.where(b_counted, tl.load(p_scale) / b_norm_x, 0.0)
        b_of_a, b_of_x = b_along / b_norm_a, b_along * b_cosine / b_norm_x
        p_out = p_dn + o_r[:, None] * D + o_d[None, :]
        b_dn = tl.load(p_out, mask=m_rd, other=0.0)
        tl.store(p_out, b_dn + b_of_x[:, None] * b_x - b_of_a[:, None] * b_a, mask=m_rd)


def forward(
    anchors: Tensor, node: Tensor, negatives: Tensor, counted: Tensor, scale: float, loss: Tensor, dn: Tensor | None
) -> None:
    """anchors (n, D), node (N), negatives (N, D), counted (N) bool → loss (N); scale times its gradient is added to dn
    (N, D) if given."""
    rows, channels = negatives.shape
    if rows == 0:
        return
    config = SIMILARITY
    block = triton.next_power_of_2(channels)
    at_once = max(1, config.values // block)
    with on_device_of(negatives):
        similarity_kernel[(triton.cdiv(rows, at_once),)](
            anchors,
            node,
            negatives,
            counted,
            loss,
            negatives if dn is None else dn,
            rows,
            channels,
            torch.full((), scale, dtype=negatives.dtype, device=negatives.device),  # a number would be rounded to fp32
            COMPUTE=compute_type(negatives.dtype),
            GRADIENT=dn is not None,
            BLOCK_R=at_once,
            BLOCK_D=block,
            num_warps=config.num_warps,
        )
