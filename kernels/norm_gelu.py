"""LayerNorm(GELU(t)) of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from gcahng.kernels.configs import ROWS
from gcahng.kernels.functions import norm_gelu
from gcahng.kernels.launch import launch_rows, rows_at

if TYPE_CHECKING:
    from gcahng.engine.stages.common import EdgesOut
    from gcahng.engine.stages.norm_gelu import NormGeluInputs


@triton.jit(do_not_specialize=["T"])
def norm_gelu_kernel(
    p_t,  # (T, D)
    p_gamma,  # (D,)
    p_beta,  # (D,)
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
    _, _, o, m_rd = rows_at(tl.program_id(0).to(tl.int64) * BLOCK_R, o_d, T, D, BLOCK_R)
    b_gamma = tl.load(p_gamma + o_d, mask=m_d, other=0.0)
    b_t = tl.load(p_t + o, mask=m_rd, other=0.0).to(b_gamma.dtype)
    b_beta = tl.load(p_beta + o_d, mask=m_d, other=0.0)
    b_y = norm_gelu(b_t, b_gamma, b_beta, m_rd, D)
    if p_y is not None:
        tl.store(p_y + o, b_y, mask=m_rd)
    if p_low is not None:
        tl.store(p_low + o, b_y.to(p_low.dtype.element_ty), mask=m_rd)


def forward(inputs: NormGeluInputs, out: EdgesOut) -> None:
    """Forms LayerNorm(GELU(t)).

    Args:
        inputs: t (T, D), and the norm's gamma and beta (D,).
        out: the result (T, D) in the accumulating type and in that of products, each where it is given.
    """
    t, norm = inputs
    launch_rows(norm_gelu_kernel, ROWS, t.shape, (t, *norm, *out))
