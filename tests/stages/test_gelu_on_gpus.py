"""GELU, exp and the logistic function as CUDA C++ has them (csrc/cuda/functions.cuh), in the emulator.

The GPU's approximate instructions may be off by units in the last place, and the emulator's are off by as many as they
may be, in either direction, or by none.
"""

from __future__ import annotations

import math

import pytest
import torch
from emulator.ops import EmulatedOps, Mode
from stages.test_gelu import gelu_truth, slope_truth
from torch import Tensor

from gcahng.testing.compare import assert_within

pytestmark = pytest.mark.simulated

EPS = torch.finfo(torch.float32).eps
roundings = pytest.mark.parametrize("off", [0, 1, -1], ids=["exact", "up", "down"])


def floats_of_interest() -> Tensor:
    """Floats of both signs: every 2^-9-th of each power of two from 2^-24 on to 2^6, and the tails densely."""
    powers = torch.arange(-24, 6, dtype=torch.float64)[:, None]
    x = (torch.exp2(powers) * (1 + torch.arange(512, dtype=torch.float64) / 512)).flatten()
    x = torch.cat((x, torch.linspace(0.5, 7, 49_152, dtype=torch.float64)))
    return torch.cat((x, -x)).float()


def gelu_and_slope(x: Tensor, off: int) -> tuple[Tensor, Tensor]:
    """By mlp_in's backward: no bias, no LayerNorm."""
    rows = x.view(-1, 1024)
    gelu, slope = (torch.full_like(rows, torch.nan) for _ in range(2))
    zero, one = torch.zeros(len(rows), 1), torch.ones(len(rows), 1)
    inputs = (rows, torch.zeros(1024), torch.ones_like(rows), zero, one, zero, zero)
    EmulatedOps(mode=Mode(approximation=off)).mlp_in_bwd_(*inputs, gelu, slope, None)
    return gelu.view(-1), slope.view(-1)


@roundings
def test_gelu(off):
    """In units in the last place of x for GELU, of 1 for its derivative.

    Φ(-a) = e^(-a²/2) r(t), t = 1 / (1 + 0.276 a). At a = 0, where it is largest, r changes by 1.4 / 2 of what t does,
    whose rounding is up to 1 unit of the reciprocal and ½ of its argument, and e^(-a²/2) is off by up to 2 units: with
    the fit (0.04), a rounding of each product and sum of r (½ together), and that of the result, 3.5. With exact
    instructions, which round to the nearest, it is 2.
    """
    x = floats_of_interest()
    gelu, slope = gelu_and_slope(x, off)
    units = ((gelu - gelu_truth(x)).abs() / (x.double().abs() * EPS)).max().item()
    most = 3.5 if off else 2.0
    assert_within(units, most, "GELU", " units")
    assert_within((slope - slope_truth(x)).abs().max().item() / EPS, most, "GELU'", " units")
    # For |x| < 32. The rational function of the CPU's is off by 1.2e-6.
    inside = x.abs() < 32
    assert_within((gelu - gelu_truth(x))[inside].abs().max().item(), 1.0e-6 if off else 3.0e-7, "GELU")


@roundings
def test_gelu_of_what_is_large_or_not_finite(off):
    x = torch.zeros(1024)
    x[:10] = torch.tensor([0.0, -0.0, 40.0, -40.0, 1e30, -1e30, math.nan, 1e-40, math.inf, -math.inf])
    gelu, slope = gelu_and_slope(x, off)
    assert gelu[:2].tolist() == [0, 0] and gelu[2:6].tolist() == [40, 0, torch.tensor(1e30).item(), 0]
    assert slope[2:6].tolist() == [1, 0, 1, 0]
    assert gelu[6].isnan() and slope[6].isnan()
    assert abs(gelu[7].item() - 0.5e-40) <= 1e-40
    assert bool(gelu[8:10].isnan().all() and slope[8:10].isnan().all())


@roundings
def test_logistic(off):
    """Relative to the result: exp is off by 2.5 units, the sum's rounding by ½, and the reciprocal and a product by
    1½."""
    x = torch.cat((torch.linspace(-85, 85, 32_768), torch.linspace(-4, 4, 32_768))).view(-1, 1024)
    theta = torch.full_like(x, torch.nan)
    EmulatedOps(mode=Mode(approximation=off)).head_fwd_(x, torch.zeros(1024), theta)
    truth = torch.sigmoid(x.double())
    assert_within(((theta - truth).abs() / truth).max().item() / EPS, 4.5 if off else 2.0, "logistic", " units")


def nan_of_a_gpu(*shape: int) -> Tensor:
    """NaN with the bits that a GPU's arithmetic gives it. The CPU's own has others."""
    return torch.full(shape, 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)


def test_logistic_of_nan():
    """It must not become a number, or diverged logits would be weights of 1 and 0."""
    ops, zeros = EmulatedOps(), torch.zeros(1024)
    for nan in (nan_of_a_gpu(1, 1024), torch.full((1, 1024), math.nan)):
        theta = torch.zeros(1, 1024)
        ops.head_fwd_(nan, zeros, theta)
        assert bool(theta.isnan().all())


def test_cross_entropy_of_nan():
    """In any column of a row, for the loss and for all of the gradient."""
    logits = torch.zeros(2, 37)
    logits[0, 5] = nan_of_a_gpu(1)[0]
    loss, d = torch.zeros(2), torch.zeros(2, 37)
    EmulatedOps().cross_entropy_(logits, torch.zeros(37), torch.arange(2), 1.0, loss, d)
    assert loss.isnan().tolist() == [True, False]
    assert bool(d[0].isnan().all() and d[1].isfinite().all())
