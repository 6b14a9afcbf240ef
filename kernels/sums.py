"""Sums in a fixed order, of what the programs of a kernel have each written to a place of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.launch import compute_type, on_device_of

_BLOCK = 32
_AT_ONCE = 64


@triton.jit
def add_partials_kernel(
    p_part,  # (P, W)
    p_into,  # (W,)
    P,
    W,
    COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """into += Σ_p part[p]. One program: BLOCK_W columns, every p in order."""
    o_w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_w = o_w < W
    b_sum = tl.zeros((BLOCK_W,), dtype=COMPUTE)
    for first in range(0, P, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P).to(tl.int64)
        m_pw = (o_p < P)[:, None] & m_w[None, :]
        b_sum += tl.sum(tl.load(p_part + o_p[:, None] * W + o_w[None, :], mask=m_pw, other=0.0), axis=0)
    b_into = tl.load(p_into + o_w, mask=m_w, other=0.0)
    tl.store(p_into + o_w, b_into + b_sum, mask=m_w)


def add_partials(part: Tensor, into: Tensor) -> None:
    """into (W) += Σ_p part (P, W), both of one dtype (fp32 or fp64)."""
    count, width = part.shape
    with on_device_of(part):
        add_partials_kernel[(triton.cdiv(width, _BLOCK),)](
            part, into, count, width, COMPUTE=compute_type(part.dtype), BLOCK_P=_AT_ONCE, BLOCK_W=_BLOCK, num_warps=4
        )


def partials(like: Tensor, count: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Room for `count` programs' sums of `width` values each, contents undefined."""
    return torch.empty(count, width, dtype=dtype or like.dtype, device=like.device)


def rows_each(rows: int, block: int, programs: int) -> int:
    """How many rows each of about `programs` programs goes through, in blocks of `block`: by shapes alone, so that sums
    come out the same on every machine."""
    return block * triton.cdiv(rows, block * programs)
