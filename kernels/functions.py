"""Functions that several kernels share, each beside its derivative. x in fp32 or fp64."""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-5)


@triton.jit
def normal_cdf(x):
    """Φ(x), the cumulative distribution of the standard normal."""
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
    """1 / (1 + exp(-x)). Only exp of what is not positive is taken, which cannot overflow."""
    b_e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, b_e, 1.0) / (1.0 + b_e)


@triton.jit
def inverse_root(x):
    """1 / √x, rounded as IEEE asks: in fp32 the plain operators are approximations."""
    if x.dtype == tl.float32:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.sqrt_rn(x))
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
    b_cdf = normal_cdf(t)
    b_g = t * b_cdf
    b_mean, b_rstd = row_moments(b_g, m_rd, D)
    b_normalized = tl.where(m_rd, (b_g - b_mean[:, None]) * b_rstd[:, None], 0.0)
    b_dn = dy * gamma[None, :]
    b_sum = tl.sum(b_dn, axis=1) / D
    b_along = tl.sum(b_dn * b_normalized, axis=1) / D
    b_dg = (b_dn - b_sum[:, None] - b_normalized * b_along[:, None]) * b_rstd[:, None]
    return b_dg * gelu_slope(t, b_cdf), b_normalized


@triton.jit
def hidden_vjp(h, bias, dn, mean, rstd, mean_dn, mean_n_dn, STORED: tl.constexpr):
    """g = GELU(h + bias) in the type in which it is STORED, and dh, given the gradient dn of the normalized g.

    h, dn (R, BLOCK_W); bias (BLOCK_W,); the others (R,): g's row moments, and the row means of dn and of dn times the
    normalized rows.
    """
    b_x = h.to(bias.dtype) + bias[None, :]
    b_cdf = normal_cdf(b_x)
    b_g = (b_x * b_cdf).to(STORED)
    b_centered = b_g.to(bias.dtype) - mean[:, None]
    b_dg = (dn.to(bias.dtype) - mean_dn[:, None] - b_centered * (mean_n_dn * rstd)[:, None]) * rstd[:, None]
    return b_g, b_dg * gelu_slope(b_x, b_cdf)


@triton.jit
def dropout_masks(i, j, seed, layer, threshold, draw, scale, TIED: tl.constexpr):
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
