"""Kernels that the gate of gcahng.testing.aot must not let pass, and what it says of them, as JSON. A script of its
own: in a process with TRITON_INTERPRET=1 kernels are not compiled."""

from __future__ import annotations

import json
import sys
from unittest.mock import patch

import torch
import triton
import triton.language as tl

from gcahng.testing import aot


@triton.jit
def sum_kernel(p_x, p_y, BLOCK: tl.constexpr):
    """Holds BLOCK values at a time, twice."""
    o = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o)
    b_sum = tl.cumsum(b_x, axis=0)
    tl.store(p_y + o, b_sum * b_x)


@triton.jit
def product_kernel(p_a, p_b, p_c, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, 64)
    b_a = tl.load(p_a + o_m[:, None] * 64 + o_k[None, :])
    b_b = tl.load(p_b + o_k[:, None] * BLOCK_N + o_n[None, :])
    tl.store(p_c + o_m[:, None] * BLOCK_N + o_n[None, :], tl.dot(b_a, b_b))


@triton.jit
def atomic_kernel(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.atomic_add(p_y + o % 4, tl.load(p_x + o))


@triton.jit
def wrong_kernel(p_x):
    tl.store(p_x, undefined)  # noqa: F821


def launch() -> None:
    """Good ones first."""
    x = torch.empty(1 << 20, device="meta")
    a, b = torch.empty(2, 1 << 16, dtype=torch.bfloat16, device="meta")
    sum_kernel[(1,)](x, x, BLOCK=4096, num_warps=4)
    product_kernel[(1,)](a, b, x, BLOCK_M=128, BLOCK_N=128, num_warps=4)
    sum_kernel[(1,)](x, x, BLOCK=4096, num_warps=4, maxnreg=24)
    product_kernel[(1,)](a, b, x, BLOCK_M=64, BLOCK_N=32, num_warps=4)
    product_kernel[(1,)](a, b, x, BLOCK_M=512, BLOCK_N=1024, num_warps=8)
    atomic_kernel[(1,)](x, x, BLOCK=128)
    wrong_kernel[(1,)](x)


if __name__ == "__main__":
    case = aot.Case(512, "bf16", 90)
    with aot.recording(case) as launches:
        launch()
    failures = [[b.kernel, b.failures()] for b in map(aot.build, launches.values())]
    with patch.object(aot, "record", lambda _: list(launches.values())):
        try:
            error = f"compiled {len(aot.build_all([case]))} kernels"
        except LookupError as missing:
            error = str(missing)
    json.dump({"failures": failures, "error": error}, sys.stdout)
