"""Functions that several kernels share, each beside its derivative. x in fp32 or fp64."""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-5)
FAR = tl.constexpr(16.0)  # Φ(-FAR) is 0 in fp32


@triton.jit
def lower_tail(a):
    """Φ(-a) in fp32 for 0 <= a <= FAR, where Φ is the cumulative distribution of the standard normal: 2 to the power of
    a polynomial, off by at most 1.5e-8 before roundings, and nothing where Φ is below 1e-10."""
    b_p = -2.562677082096343e-06 * a + 3.660072252387181e-05
    b_p = b_p * a - 1.750942610669881e-04
    b_p = b_p * a - 1.5904517204035074e-04
    b_p = b_p * a + 7.086713332682848e-03
    b_p = b_p * a - 5.250875651836395e-02
    b_p = b_p * a - 4.5920512080192566e-01
    b_p = b_p * a - 1.1511054039001465
    return tl.exp2(b_p * a - 1.0)


@triton.jit
def gelu(x):
    """x Φ(x), exact. In fp32 as max(x, 0) - |x| Φ(-|x|), within a unit in the last place of x
    (tests/stages/test_gelu.py), for a quarter of what erf costs."""
    if x.dtype == tl.float32:
        b_a = tl.minimum(tl.abs(x), FAR, propagate_nan=tl.PropagateNan.ALL)
        return tl.maximum(x, 0.0) - b_a * lower_tail(b_a)
    else:
        return x * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)))


@triton.jit
def gelu_and_slope(x):
    """gelu(x) and its derivative Φ(x) + x φ(x), where φ is the density of the standard normal."""
    if x.dtype == tl.float32:
        b_a = tl.minimum(tl.abs(x), FAR, propagate_nan=tl.PropagateNan.ALL)
        b_tail = lower_tail(b_a)
        b_density = tl.exp2(b_a * (b_a * -0.7213475204444817) - 1.3257480647361595)
        b_below = b_tail - b_a * b_density  # the slope at -a; that at a is what it lacks to 1
        return tl.maximum(x, 0.0) - b_a * b_tail, tl.where(x > 0.0, 1.0 - b_below, b_below)
    else:
        b_cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * b_cdf, b_cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def exponential(x):
    """exp(x)."""
    if x.dtype == tl.float32:
        return tl.exp2(x * 1.4426950408889634)
    else:
        return tl.exp(x)


@triton.jit
def logistic(x):
    """1 / (1 + exp(-x)). Only exp of what is not positive is taken, which cannot overflow."""
    b_e = exponential(-tl.abs(x))
    return tl.where(x < 0, b_e, 1.0) / (1.0 + b_e)


@triton.jit
def inverse_root(x):
    """1 / √x. In fp32 an approximation and one step of Newton's, which leaves little more than a rounding."""
    if x.dtype == tl.float32:
        b_y = tl.rsqrt(x)
        return b_y + b_y * (0.5 - 0.5 * x * b_y * b_y)
    else:
        return 1.0 / tl.sqrt(x)


@triton.jit
def row_moments(x, m_rd, D):
    """Mean and 1/σ (R,) of the D values of each row of x (R, BLOCK_D), which is 0 outside of the mask."""
    b_mean = tl.sum(x, axis=1) / D
    b_centered = tl.where(m_rd, x - b_mean[:, None], 0.0)
    return b_mean, inverse_root(tl.sum(b_centered * b_centered, axis=1) / D + NORM_EPS)


@triton.jit
def normalized(x, mean, rstd, gamma, beta):
    """LayerNorm of rows x (R, BLOCK_D), given their moments (R,); gamma and beta (BLOCK_D,)."""
    return (x - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]


@triton.jit
def norm_gelu(t, gamma, beta, m_rd, D):
    """LayerNorm(GELU(t)) of rows t (R, BLOCK_D), 0 outside of the mask; gamma and beta (BLOCK_D,)."""
    b_g = gelu(t)
    b_mean, b_rstd = row_moments(b_g, m_rd, D)
    return normalized(b_g, b_mean, b_rstd, gamma, beta)


@triton.jit
def norm_gelu_backward(t, gamma, dy, m_rd, D):
    """dt given dy (R, BLOCK_D), and the normalized rows.

    t, dy and gamma are 0 outside of the mask. What dt is there has no meaning.
    """
    b_g, b_slope = gelu_and_slope(t)
    b_mean, b_rstd = row_moments(b_g, m_rd, D)
    b_normalized = tl.where(m_rd, (b_g - b_mean[:, None]) * b_rstd[:, None], 0.0)
    b_dn = dy * gamma[None, :]
    b_sum = tl.sum(b_dn, axis=1) / D
    b_along = tl.sum(b_dn * b_normalized, axis=1) / D
    b_dg = (b_dn - b_sum[:, None] - b_normalized * b_along[:, None]) * b_rstd[:, None]
    return b_dg * b_slope, b_normalized


@triton.jit
def hidden_vjp(h, bias, dn, mean, rstd, mean_dn, mean_n_dn, STORED: tl.constexpr):
    """g = GELU(h + bias) in the type in which it is STORED, and dh, given the gradient dn of the normalized g.

    h, dn (R, BLOCK_W); bias (BLOCK_W,); the others (R,): g's row moments, and the row means of dn and of dn times the
    normalized rows.
    """
    b_g, b_slope = gelu_and_slope(h.to(bias.dtype) + bias[None, :])
    b_g = b_g.to(STORED)
    b_along = mean_n_dn * rstd * rstd
    b_rest = mean * b_along - mean_dn * rstd
    b_dg = dn.to(bias.dtype) * rstd[:, None] + (b_rest[:, None] - b_g.to(bias.dtype) * b_along[:, None])
    return b_g, b_dg * b_slope


@triton.jit
def dropped_tokens(i, j, seed, layer, threshold, draw, TIED: tl.constexpr):
    """Whether dropout takes the attention weights of nodes i and j of an edge out (docs/math/random.md)."""
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
    return b_i < threshold, b_j < threshold
