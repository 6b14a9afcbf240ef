"""The gate's maths, for the kernel that ends with it and for the one in which it comes before the edge MLP."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from gcahng.kernels.functions import keeps, logistic

DROPOUT = ("seed", "layer", "threshold")


def dropout_arguments(dropout: Sequence[int], scale: float) -> tuple[tuple[int, int, int], dict[str, float | bool]]:
    """As arguments of kernels: (seed, layer, threshold), and constants: a float argument would be rounded to fp32."""
    seed, layer, threshold, tied = dropout
    return (seed, layer, threshold), {"SCALE": scale, "TIED": bool(tied), "DROP": threshold != 0}


@triton.jit
def factors(
    o_i,
    o_j,
    nodes,
    seed,
    layer,
    threshold,
    p_draw,
    SCALE: tl.constexpr,
    TIED: tl.constexpr,
    DROP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """What dropout multiplies the attention weights of i and of j with; o_i, o_j: places in a wrapped tensor."""
    b_scale = tl.full(o_j.shape, SCALE, COMPUTE)
    if DROP:
        draw = tl.load(p_draw).to(tl.uint32)
        b_i, b_j = keeps(o_i, o_j % nodes, seed, layer, threshold, draw, b_scale, TIED)
    else:
        b_i, b_j = b_scale, b_scale
    return b_i, b_j


@triton.jit
def attention(e, u_i, u_j, c, ROOT: tl.constexpr):
    """p and 1 - p (R,) of edges e (R, BLOCK_D) by their tokens; c (R,): that of i less that of j."""
    b_logit = (tl.sum(e * (u_i - u_j), axis=1) + c) * ROOT
    return logistic(b_logit), logistic(-b_logit)


@triton.jit
def gate_sum(e, w_i, v_i, w_j, v_j):
    """The pre-norm sum t (R, BLOCK_D), by what is left of the attention weights (R,)."""
    return e + w_i[:, None] * v_i + w_j[:, None] * v_j
