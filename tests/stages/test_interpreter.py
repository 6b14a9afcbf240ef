"""Triton's interpreter computes bf16 as a GPU does (gcahng/testing/interpreter.py)."""

from __future__ import annotations

import importlib

import pytest
import torch
from stages.cases import Setup
from stages.checks import STAGES, check_stage

from gcahng.testing import seeded

pytestmark = pytest.mark.simulated
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def elementwise_kernel(p_x, p_y, p_wide, p_low, p_below, p_double, N: tl.constexpr):
    o = tl.arange(0, N)
    b_x, b_y = tl.load(p_x + o), tl.load(p_y + o)
    b_low = b_x.to(tl.bfloat16)
    tl.store(p_wide + o, (b_low * b_y - b_low).to(tl.float32))
    tl.store(p_low + o, b_low)
    tl.store(p_below + o, (b_low < b_y).to(tl.int8))
    tl.store(p_double + o, b_x.to(tl.float64).to(tl.bfloat16).to(tl.float64))


@triton.jit
def product_kernel(p_a, p_b, p_c, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(p_c + o, tl.dot(tl.load(p_a + o), tl.load(p_b + o)))


@triton.jit
def sum_kernel(p_y, p_wide, N: tl.constexpr):
    tl.store(p_wide, tl.sum(tl.load(p_y + tl.arange(0, N)), axis=0))


def test_values_are_rounded_to_nearest_and_ties_to_even():
    special = [0.0, -0.0, 1e-40, 3.4e38, torch.inf, -torch.inf, torch.nan]
    ties = (torch.arange(64, dtype=torch.int32) * 0x8000 + 0x3F800000).view(torch.float32)
    x = torch.cat((torch.tensor(special), ties, seeded(512 - 64 - len(special), seed=1)))
    y = seeded(512, seed=2).bfloat16()
    wide, low, below, double = (torch.empty(512, dtype=dtype) for dtype in (x.dtype, y.dtype, torch.int8, torch.double))
    elementwise_kernel[(1,)](x, y, wide, low, below, double, N=512)
    rounded = x.bfloat16()
    torch.testing.assert_close(low, rounded, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, (rounded * y - rounded).float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(below.bool(), rounded < y)
    torch.testing.assert_close(double, rounded.double(), rtol=0, atol=0, equal_nan=True)


def test_products_add_up_in_float32():
    a, b = (seeded(64, 64, seed=seed).bfloat16() for seed in (1, 2))
    c = torch.empty(64, 64)
    product_kernel[(1,)](a, b, c, N=64)
    wanted = a.double() @ b.double()
    assert (c.double() - wanted).abs().max() <= 64 * torch.finfo(torch.float32).eps * wanted.abs().max()


def test_what_no_kernel_asks_for_is_an_error():
    with pytest.raises(Exception, match="in bfloat16 is not interpreted; it must be in float32"):
        sum_kernel[(1,)](torch.ones(16).bfloat16(), torch.empty(1), N=16)


@pytest.mark.parametrize("name", ["mlp_in.forward", "gate.forward", "edge_to_node.backward"])
def test_values_a_few_roundings_off_are_refused(name, triton, monkeypatch):
    importlib.import_module(f"stages.test_{name.split('.')[0]}")
    interpreter = importlib.import_module("gcahng.testing.interpreter")
    narrow = interpreter._narrow

    def off(values):
        return narrow(values * (1 + 6 * torch.finfo(torch.bfloat16).eps))

    monkeypatch.setattr("gcahng.testing.compare.observers", [])
    setup = Setup(4, 2, 64, 100)
    check_stage(triton, STAGES[name], [(setup, "bfloat16")])
    monkeypatch.setattr(interpreter, "_narrow", off)
    with pytest.raises(AssertionError, match="off by"):
        check_stage(triton, STAGES[name], [(setup, "bfloat16")])
