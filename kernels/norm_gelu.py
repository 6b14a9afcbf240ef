"""LayerNorm(GELU(t)) of rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import ROWS
from gcahng.kernels.functions import norm_gelu
from gcahng.kernels.launch import on_device_of, row_block


@triton.jit(do_not_specialize=["T"])
def norm_gelu_kernel(
    p_t,  # (T, D)
    p_gamma,  # (D,)
    p_beta,  # (D,)
    p_y,  # (T, D) or None
    p_low,  # (T, D) or None
    T,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R rows."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_rd = (o_r < T)[:, None] & m_d[None, :]
    o = o_r[:, None] * D + o_d[None, :]
    b_t = tl.load(p_t + o, mask=m_rd, other=0.0)
    b_gamma = tl.load(p_gamma + o_d, mask=m_d, other=0.0)
    b_beta = tl.load(p_beta + o_d, mask=m_d, other=0.0)
    b_y = norm_gelu(b_t, b_gamma, b_beta, m_rd, D)
    if p_y is not None:
        tl.store(p_y + o, b_y, mask=m_rd)
    if p_low is not None:
        tl.store(p_low + o, b_y.to(p_low.dtype.element_ty), mask=m_rd)


def forward(t: Tensor, gamma: Tensor, beta: Tensor, y: Tensor | None, low: Tensor | None) -> None:
    """t (T, D) → y and low (T, D)."""
    rows, dim = t.shape
    block_r, block_d = row_block(dim, ROWS)
    if t.numel():
        with on_device_of(t):
            norm_gelu_kernel[(triton.cdiv(rows, block_r),)](
                t, gamma, beta, y, low, rows, dim, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=ROWS.num_warps
            )
