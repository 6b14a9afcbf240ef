"""1 - cos of negatives and their anchors, and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from gcahng.kernels.configs import SIMILARITY
from gcahng.kernels.launch import as_tensor, compute_type, launch_rows, rows_at

if TYPE_CHECKING:
    from gcahng.engine.stages.similarity import SimilarityInputs, SimilarityOutputs


@triton.jit
def similarity_kernel(
    p_anchors,  # (n, D)
    p_node,  # (N,) int64
    p_negatives,  # (N, D)
    p_counted,  # (N,) bool
    p_loss,  # (N,)
    p_dn,  # (N, D)
    p_scale,  # (1,)
    N,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R rows, whole."""
    o_d = tl.arange(0, BLOCK_D)
    o_r, m_r, o, m_rd = rows_at(tl.program_id(0).to(tl.int64) * BLOCK_R, o_d, N, D, BLOCK_R)
    b_counted = tl.load(p_counted + o_r, mask=m_r, other=0) != 0
    b_node = tl.load(p_node + o_r, mask=m_r, other=0)
    b_a = tl.load(p_anchors + b_node[:, None] * D + o_d[None, :], mask=m_rd, other=0.0)
    b_x = tl.load(p_negatives + o, mask=m_rd, other=0.0)
    b_norm_a = tl.maximum(tl.sqrt(tl.sum(b_a * b_a, axis=1)), 1e-8)
    b_norm_x = tl.maximum(tl.sqrt(tl.sum(b_x * b_x, axis=1)), 1e-8)
    b_cosine = tl.sum(b_a * b_x, axis=1) / (b_norm_a * b_norm_x)
    tl.store(p_loss + o_r, tl.where(b_counted, 1.0 - b_cosine, 0.0), mask=m_r)
    if GRADIENT:
        b_along = tl.where(b_counted, tl.load(p_scale) / b_norm_x, 0.0)
        b_of_a, b_of_x = b_along / b_norm_a, b_along * b_cosine / b_norm_x
        b_dn = tl.load(p_dn + o, mask=m_rd, other=0.0)
        tl.store(p_dn + o, b_dn + b_of_x[:, None] * b_x - b_of_a[:, None] * b_a, mask=m_rd)


def forward(inputs: SimilarityInputs, outputs: SimilarityOutputs) -> None:
    """Forms the loss that keeps negatives near their anchors.

    Args:
        inputs: anchors (n, D); the anchor's node (N,) int64 of each of the negatives (N, D); which of them are counted
            (N,) bool; the scale of the gradient.
        outputs: loss (N,) = 1 - cos, 0 where a negative is not counted; dn (N, D) += scale times the loss's gradient,
            where it is given.
    """
    anchors, node, negatives, counted, scale = inputs
    loss, dn = outputs
    pointers = (anchors, node, negatives, counted, loss, negatives if dn is None else dn, as_tensor(scale, negatives))
    launch_rows(
        similarity_kernel,
        SIMILARITY,
        negatives.shape,
        pointers,
        COMPUTE=compute_type(negatives.dtype),
        GRADIENT=dn is not None,
    )
