"""Cross entropy of rows of logits under a bias, and its gradient: two passes over a row; no probabilities are saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from gcahng.kernels.configs import CROSS_ENTROPY
from gcahng.kernels.launch import as_tensor, compute_type, on_device_of

if TYPE_CHECKING:
    from gcahng.engine.stages.cross_entropy import CrossEntropyInputs, CrossEntropyOutputs


@triton.jit
def cross_entropy_kernel(
    p_logits,  # (R, M), without the bias
    p_bias,  # (M,)
    p_labels,  # (R,) int64
    p_loss,  # (R,)
    p_d,  # (R, M), may be the logits
    M,
    p_scale,  # (1,)
    COMPUTE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program: one row. All that is read for the sums is read before they are known, so d may overwrite it."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_labels + row)
    # Lanes that have met no logit yet hold what is below all of them, but finite: inf - inf is no number.
    b_most = tl.full((BLOCK_M,), -3.0e38, dtype=COMPUTE)
    b_sum = tl.zeros((BLOCK_M,), dtype=COMPUTE)
    b_own = tl.zeros((BLOCK_M,), dtype=COMPUTE)
    for first in range(0, M, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        b_bias = tl.load(p_bias + o_m, mask=m_m, other=0.0)
        b_x = tl.load(p_logits + row * M + o_m, mask=m_m, other=0.0).to(COMPUTE) + b_bias
        b_x = tl.where(m_m, b_x, -3.0e38)
        b_larger = tl.maximum(b_most, b_x)
        b_sum = b_sum * tl.exp(b_most - b_larger) + tl.where(m_m, tl.exp(b_x - b_larger), 0.0)
        b_most = b_larger
        b_own += tl.where(o_m == label, b_x, 0.0)
    most = tl.max(b_most, axis=0)
    total = tl.sum(b_sum * tl.exp(b_most - most), axis=0)
    tl.store(p_loss + row, tl.log(total) - (tl.sum(b_own, axis=0) - most))
    if GRADIENT:
        by = tl.load(p_scale)
        for first in range(0, M, BLOCK_M):
            o_m = first + tl.arange(0, BLOCK_M)
            m_m = o_m < M
            b_bias = tl.load(p_bias + o_m, mask=m_m, other=0.0)
            b_x = tl.load(p_logits + row * M + o_m, mask=m_m, other=0.0).to(COMPUTE) + b_bias
            b_d = tl.exp(b_x - most) / total * by - tl.where(o_m == label, by, 0.0)
            tl.store(p_d + row * M + o_m, b_d.to(p_d.dtype.element_ty), mask=m_m)


def forward(inputs: CrossEntropyInputs, outputs: CrossEntropyOutputs) -> None:
    """Forms the cross entropy of rows of logits.

    Args:
        inputs: logits (R, M) without the bias (M,), labels (R,) int64, and the scale of the gradient.
        outputs: loss (R,); d (R, M), scale times the loss's gradient in any type, where it is given: it may be the
            logits.
    """
    logits, bias, labels, scale = inputs
    loss, d = outputs
    rows, classes = logits.shape
    if rows == 0:
        return
    config = CROSS_ENTROPY
    with on_device_of(logits):
        cross_entropy_kernel[(rows,)](
            logits,
            bias,
            labels,
            loss,
            logits if d is None else d,
            classes,
            as_tensor(scale, bias),
            COMPUTE=compute_type(bias.dtype),
            GRADIENT=d is not None,
            BLOCK_M=config.values,
            num_warps=config.num_warps,
        )
