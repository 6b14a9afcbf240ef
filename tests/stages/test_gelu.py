"""GELU and its derivative, as the C++ stages (csrc/common/gelu.h) and Triton (kernels/functions.py) have them, through
mlp_in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.stages.mlp_in import (
    MlpInGradients,
    MlpInInputs,
    MlpInOutputs,
    MlpInUpstream,
    NormRows,
)
from gcahng.testing.compare import assert_within

RANGES = ((-30, -6), (-6, -3), (-3, -1), (-1, 0), (0, 1), (1, 3), (3, 6), (6, 30))
POINTS = 100_000


def gelu_truth(x: Tensor) -> Tensor:
    x = x.double()
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


def slope_truth(x: Tensor) -> Tensor:
    x = x.double()
    return 0.5 * torch.special.erfc(-x / math.sqrt(2)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def slope_of(ops, x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its derivative of rows x, by the backward: no bias, no LayerNorm."""
    gelu, slope = (torch.full_like(x, torch.nan) for _ in range(2))
    zero, one = torch.zeros(len(x), 1).to(x), torch.ones(len(x), 1).to(x)
    inputs, rows = MlpInInputs(x, x.new_zeros(x.shape[1])), NormRows(zero, one, zero, zero)
    ops.mlp_in_bwd_(inputs, MlpInUpstream(torch.ones_like(x)), rows, MlpInGradients(gelu, slope, None))
    return gelu, slope


def gelu_of(ops, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of x (N,), and by the forward."""
    rows = x.view(-1, 1000)
    g, moments = torch.full_like(rows, torch.nan), torch.zeros(2, len(rows), 1).to(x)
    ops.mlp_in_fwd_(MlpInInputs(rows, x.new_zeros(1000)), MlpInOutputs(g, *moments))
    again, slope = slope_of(ops, rows)
    assert torch.equal(g, again), "the backward forms the same GELU"
    return g.view(-1), slope.view(-1)


@pytest.mark.parametrize("span", RANGES, ids=str)
def test_gelu_in_float32(span, cpp):
    """In units in the last place of x for GELU, of 1 for its derivative: the formulas' own sizes, the tails cancel.

    erf is within 6 of its own units (csrc/common/gelu.h), which are half as large, and halved in Φ = ½ (1 + erf): 1.5.
    Roundings add ¼ in 1 + erf, at most ¼ in erf's argument, and ½ in what is returned; xφ(x) in the derivative has
    another ½. Beyond |x| = 4 √2, erf is 1 and the last rounding alone is left.
    """
    x = torch.linspace(*span, POINTS, dtype=torch.float64).float()
    eps = torch.finfo(torch.float32).eps
    gelu, slope = gelu_of(cpp.ops, x)
    tail = min(map(abs, span)) >= 6
    off = ((gelu - gelu_truth(x)).abs() / (x.double().abs() * eps).clamp_min(1e-30)).max().item()
    assert_within(off, 0.5 if tail else 2.5, "GELU", " units")
    assert_within((slope - slope_truth(x)).abs().max().item() / eps, 0.5 if tail else 3.0, "GELU'", " units")


@pytest.mark.simulated
@pytest.mark.parametrize("span", RANGES, ids=str)
def test_gelu_of_triton_in_float32(span, triton):
    """In the same units. Φ is within ⅛ of a unit (kernels/functions.py); the roundings of its exponent, which is below
    4 where Φ is above 0.06, add ¼, and that of the result ½. The derivative has xφ(x) beside it, off by as much. On a
    GPU powers of two are within 2^-22 of themselves, which adds ¼ at most."""
    x = torch.linspace(*span, POINTS, dtype=torch.float64).float()
    eps = torch.finfo(torch.float32).eps
    gelu, slope = gelu_of(triton.ops, x)
    off = ((gelu - gelu_truth(x)).abs() / (x.double().abs() * eps).clamp_min(1e-30)).max().item()
    assert_within(off, 1.0, "GELU", " units")
    assert_within((slope - slope_truth(x)).abs().max().item() / eps, 1.5, "GELU'", " units")


@pytest.mark.parametrize("span", RANGES, ids=str)
def test_gelu_in_float64(span, cpp):
    x = torch.linspace(*span, POINTS, dtype=torch.float64)
    gelu, slope = gelu_of(cpp.ops, x)
    torch.testing.assert_close(gelu, F.gelu(x), rtol=0, atol=4 * torch.finfo(torch.float64).eps * max(map(abs, span)))
    torch.testing.assert_close(slope, slope_truth(x), rtol=0, atol=1e-15)


@pytest.mark.simulated
def test_gelu_of_triton_at_special_values(triton):
    x = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 40.0, -40.0, 1e30, -1e30, 3e38, -3e38, math.inf, -math.inf, math.nan])
    gelu, slope = (found.view(-1) for found in slope_of(triton.ops, x.view(-1, 1)))
    torch.testing.assert_close(gelu[:-3].double(), gelu_truth(x[:-3]), rtol=1e-6, atol=1e-38)
    torch.testing.assert_close(slope[:-3].double(), slope_truth(x[:-3].clamp(-1e30, 1e30)), rtol=0, atol=1e-7)
    assert gelu[-3] == math.inf and gelu[-2] == 0 and gelu[-1].isnan()
    assert slope[-1].isnan()


def test_gelu_at_special_values(cpp):
    x = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e-45, 40.0, -40.0, 1e30, -1e30, 3e38, -3e38, math.inf, math.nan])
    gelu, slope = (found.view(-1) for found in slope_of(cpp.ops, x.view(-1, 1)))  # a row each: no LayerNorm joins them
    finite = x.abs() <= 3e38
    torch.testing.assert_close(gelu[finite].double(), gelu_truth(x[finite]), rtol=1e-6, atol=1e-38)
    moderate = x.abs() <= 1e30
    torch.testing.assert_close(slope[moderate].double(), slope_truth(x[moderate]), rtol=0, atol=1e-7)
    assert gelu[-2] == math.inf and gelu[-1].isnan() and slope[-1].isnan()
