"""Functions that several kernels share, each beside its derivative. x in fp32 or fp64."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu(x):
    """x Φ(x), exact."""
    return x * normal_cdf(x)


@triton.jit
def gelu_slope(x, cdf):
    """The derivative of gelu, given Φ(x)."""
    return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def logistic(x):
    """1 / (1 + exp(-x)), by exp of what is not positive."""
    b_e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, b_e, 1.0) / (1.0 + b_e)


@triton.jit
def keeps(i, j, seed, layer, threshold, draw, scale, TIED: tl.constexpr):
    """What the attention weights of nodes i and j of an edge are multiplied with: 0, or scale (docs/math/random.md)."""
    if TIED:
        b_low, b_high = tl.minimum(i, j), tl.maximum(i, j)
    else:
        b_low, b_high = i, j
    b_0, b_1, _, _ = tl.philox(seed, b_low.to(tl.uint32), b_high.to(tl.uint32), layer, draw)
    if TIED:
        b_swapped = i > j
        b_i, b_j = tl.where(b_swapped, b_1, b_0), tl.where(b_swapped, b_0, b_1)
    else:
        b_i, b_j = b_0, b_1
    return tl.where(b_i < threshold, 0.0, scale), tl.where(b_j < threshold, 0.0, scale)
