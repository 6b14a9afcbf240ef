"""Blocks of a matrix product, for kernels that go on with the product in an epilogue."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gcahng.kernels.configs import Product


def dot_precision() -> str:
    """How fp32 operands are multiplied: as torch's own switch says. Narrower ones are multiplied as they are."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def product_constants(config: Product, inner: int) -> dict[str, Any]:
    """The constants of a kernel with a product over `inner` values, its warps and its stages."""
    return {
        "PRECISION": dot_precision(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        "num_warps": config.num_warps,
        "num_stages": min(config.num_stages, triton.cdiv(inner, config.block_k)),
    }


@triton.jit
def block_of(program, blocks_m, blocks_n, GROUP: tl.constexpr):
    """The row block and the column block of a program: GROUP row blocks go through all column blocks together, so that
    their operands stay in cache."""
    in_group = GROUP * blocks_n
    first_m = program // in_group * GROUP
    height = tl.minimum(blocks_m - first_m, GROUP)
    return first_m + program % in_group % height, program % in_group // height


@triton.jit
def block_product(
    p_a,  # (M, K), rows K apart
    p_b,  # (K, N), by its strides
    o_m,
    o_n,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    stride_n: tl.constexpr,
    stride_k: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows o_m and columns o_n of a b, in fp32, where one of b's strides is 1. Rows and columns past the last have no
    meaning: they repeat it where that spares a mask."""
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    EVEN_N: tl.constexpr = N % BLOCK_N == 0
    ALONG_N: tl.constexpr = stride_n == 1  # b's rows, rather than its columns, lie together in memory
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < N
    o_m = tl.minimum(o_m, M - 1)
    if not (EVEN_N or ALONG_N):
        o_n = tl.minimum(o_n, N - 1)
    p_a += o_m[:, None] * K + o_k[None, :]
    p_b += o_k[:, None].to(tl.int64) * stride_k + o_n[None, :].to(tl.int64) * stride_n
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        if EVEN_K:
            b_a = tl.load(p_a)
            b_b = tl.load(p_b, mask=m_n[None, :], other=0.0) if ALONG_N and not EVEN_N else tl.load(p_b)
        else:
            m_k = o_k < K - first
            b_a = tl.load(p_a, mask=m_k[None, :], other=0.0)
            m_b = m_k[:, None] & m_n[None, :] if ALONG_N and not EVEN_N else m_k[:, None]
            b_b = tl.load(p_b, mask=m_b, other=0.0)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
        p_a += BLOCK_K
        p_b += BLOCK_K * stride_k
    return b_sum


@triton.jit
def block_places(block_m, first_n, T, W, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a block (BLOCK_M, BLOCK_N) of a (T, W) tensor lies: its row block, and its columns from first_n on.

    Returns:
        first_m: its first row (int64).
        o_m, o_n: its rows (int64) and its columns.
        m_m, m_n: which of them there are.
        o: its values' places from the first row on, in 32 bits to spare registers.
    """
    first_m = block_m.to(tl.int64) * BLOCK_M
    o_m = first_m + tl.arange(0, BLOCK_M)
    o_n = first_n + tl.arange(0, BLOCK_N)
    return first_m, o_m, o_n, o_m < T, o_n < W, tl.arange(0, BLOCK_M)[:, None] * W + o_n[None, :]


@triton.jit
def column_halves(x):
    """The left and the right half of x (M, N)."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def column_quarters(x):
    """x (M, N) as four parts of neighboring columns."""
    b_first, b_second = column_halves(x)
    b_0, b_1 = column_halves(b_first)
    b_2, b_3 = column_halves(b_second)
    return b_0, b_1, b_2, b_3


@triton.jit
def column_parts(x, PARTS: tl.constexpr):
    """x (M, N) as a tuple of 1, 2, 4 or 8 parts of neighboring columns: an epilogue that takes them one after the
    other needs fewer registers."""
    if PARTS == 1:
        return (x,)
    elif PARTS == 2:
        return column_halves(x)
    elif PARTS == 4:
        return column_quarters(x)
    else:
        b_first, b_second = column_halves(x)
        b_0, b_1, b_2, b_3 = column_quarters(b_first)
        b_4, b_5, b_6, b_7 = column_quarters(b_second)
        return b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7


@triton.jit
def halves_joined(first, second):
    """What column_halves took apart."""
    b_both = tl.permute(tl.join(first, second), (0, 2, 1))
    return tl.reshape(b_both, (first.shape[0], 2 * first.shape[1]))


@triton.jit
def columns_joined(parts, PARTS: tl.constexpr):
    """What column_parts took apart."""
    if PARTS == 1:
        return parts[0]
    elif PARTS == 2:
        return halves_joined(parts[0], parts[1])
    elif PARTS == 4:
        return halves_joined(halves_joined(parts[0], parts[1]), halves_joined(parts[2], parts[3]))
    else:
        b_first = halves_joined(halves_joined(parts[0], parts[1]), halves_joined(parts[2], parts[3]))
        b_second = halves_joined(halves_joined(parts[4], parts[5]), halves_joined(parts[6], parts[7]))
        return halves_joined(b_first, b_second)
