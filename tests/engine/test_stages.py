"""Each C++ stage against plain torch: fp32, fp64 and bf16 products, every instruction set, poisoned memory."""

from __future__ import annotations

import math

import pytest
import torch
from engine_cases import Case
from stage_cases import SETUPS, Some
from stage_checks import (
    STAGES,
    TILED,
    check_a_positive_is_never_farther_than_itself,
    check_attention_far_from_half,
    check_coefficients_near_zero,
    check_entropy_far_from_zero,
    check_gradient_of_sure_rows,
    check_hidden_values_as_they_are_stored,
    check_moments,
    check_outputs_on_their_own,
    check_similarity_of_short_vectors,
    check_stage,
    check_store_in_bfloat16,
    check_variance_of_edges_far_from_zero,
)
from torch import Tensor
from torch.nn import functional as F

from gcahng import _native
from gcahng.testing import seeded
from gcahng.testing.compare import assert_within

PRECISIONS = ("float64", "float32", "bfloat16")
ops = torch.ops.gcahng

# More edges between two classes than a unit of work has otherwise.
MOST_VIEWS = Some(3, 64, 3, 0, p=0.2, tiles=((0, 1, 1, 2, 1),))

# The instruction set in force on every setup, the others on the first (on all: -m slow).
ON_SETUPS = [
    pytest.param(arch, setup, marks=[pytest.mark.slow] if arch != _native.cpu_arch() and number > 0 else [])
    for arch in _native.CPU_ARCHES
    for number, setup in enumerate(SETUPS)
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("arch", "setup"), ON_SETUPS, indirect=["arch"], ids=str)
def test_stage(setup, stage, precision, arch):
    check_stage(setup, stage, precision, "cpp")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_store_in_bfloat16(setup, precision, arch):
    check_store_in_bfloat16(setup, precision, "cpp")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_moments(setup, precision, arch):
    check_moments(setup, precision, "cpp")


def test_entropy_far_from_zero(arch):
    check_entropy_far_from_zero("cpp")


@pytest.mark.parametrize("stage", TILED)
def test_most_views(stage, arch):
    check_stage(MOST_VIEWS, stage, "float64", "cpp")


def test_a_positive_is_never_farther_than_itself(arch):
    check_a_positive_is_never_farther_than_itself("cpp")


def test_hidden_values_as_they_are_stored(arch):
    check_hidden_values_as_they_are_stored(ops, torch.bfloat16)


def test_outputs_on_their_own(arch):
    check_outputs_on_their_own(ops, torch.bfloat16)


def test_coefficients_near_zero(arch):
    check_coefficients_near_zero("cpp")


def test_similarity_of_short_vectors(arch):
    check_similarity_of_short_vectors("cpp")


def test_gradient_of_sure_rows(arch):
    check_gradient_of_sure_rows("cpp", torch.bfloat16)


def test_attention_far_from_half(arch):
    check_attention_far_from_half("cpp")


def test_variance_of_edges_far_from_zero(arch):
    check_variance_of_edges_far_from_zero("cpp")


def test_long_sums(arch):
    """They are formed in runs: their error grows as the root of what is summed, or it would be twice this."""
    width = 1 << 17
    h, zero = seeded(2, width, seed=1, dtype=torch.float32).abs(), torch.zeros(width)
    g, mean, rstd = torch.empty_like(h), torch.empty(2, 1), torch.empty(2, 1)
    ops.mlp_in_fwd_(h, zero, g, mean, rstd)
    variance, center = torch.var_mean(g.double(), dim=1, correction=0, keepdim=True)
    torch.testing.assert_close(mean.double(), center, rtol=5e-7, atol=0)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=5e-7, atol=0)


def test_rounding_to_bfloat16(arch):
    """To the nearest, ties to even; and a NaN whose bits a carry would run through stays one."""
    x = torch.stack([seeded(500, 3, seed=seed, dtype=torch.float32).bfloat16().float() for seed in (1, 2)], dim=1)
    exact, rounded = torch.empty(500, 3), torch.empty(500, 3, dtype=torch.bfloat16)
    for row, pair in enumerate(x):  # one edge each: the product of its two nodes
        ops.edge_start_fwd_([1, 1, 1, 0, 1, 1, 2], pair.contiguous(), exact[row : row + 1], rounded[row : row + 1])
    bits = exact.view(torch.int32)
    assert all(bool((bits & 0x1FFFF == tie).any()) for tie in (0x08000, 0x18000))
    assert torch.equal(rounded, exact.bfloat16())

    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32).view(1, 2)
    low = torch.zeros(1, 2, dtype=torch.bfloat16)
    ops.edge_start_fwd_([1, 1, 1, 0, 1, 1, 2], torch.cat((nan, torch.ones(1, 2))), None, low)
    assert bool(low.isnan().all())


# -- the functions in them


RANGES = ((-30, -6), (-6, -3), (-3, -1), (-1, 0), (0, 1), (1, 3), (3, 6), (6, 30))
POINTS = 100_000


def gelu_truth(x: Tensor) -> Tensor:
    x = x.double()
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


def slope_truth(x: Tensor) -> Tensor:
    x = x.double()
    return 0.5 * torch.special.erfc(-x / math.sqrt(2)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def cpp_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its derivative, through the stage mlp_in: one row in, no bias, no LayerNorm."""
    rows = x.view(-1, 1000)
    g, again, slope = (torch.full_like(rows, torch.nan) for _ in range(3))
    zero, one, none = torch.zeros(len(rows), 1).to(x), torch.ones(len(rows), 1).to(x), torch.zeros(1000).to(x)
    ops.mlp_in_fwd_(rows, none, g, zero.clone(), one.clone())
    ops.mlp_in_bwd_(rows, none, torch.ones_like(rows), zero, one, zero, zero, again, slope, None)
    assert torch.equal(g, again), "the backward forms the same GELU"
    return g.view(-1), slope.view(-1)


@pytest.mark.parametrize("span", RANGES, ids=str)
def test_gelu_in_float32(span, arch):
    """In units in the last place of x for GELU, of 1 for its derivative: the formulas' own sizes, the tails cancel.

    erf is within 6 of its own units (csrc/common/gelu.h), which are half as large, and halved in Φ = ½ (1 + erf): 1.5.
    Roundings add ¼ in 1 + erf, at most ¼ in erf's argument, and ½ in what is returned; xφ(x) in the derivative has
    another ½. Beyond |x| = 4 √2, erf is 1 and the last rounding alone is left.
    """
    x = torch.linspace(*span, POINTS, dtype=torch.float64).float()
    eps = torch.finfo(torch.float32).eps
    gelu, slope = cpp_gelu(x)
    tail = min(map(abs, span)) >= 6
    off = ((gelu - gelu_truth(x)).abs() / (x.double().abs() * eps).clamp_min(1e-30)).max().item()
    assert_within(off, 0.5 if tail else 2.5, "GELU", " units")
    assert_within((slope - slope_truth(x)).abs().max().item() / eps, 0.5 if tail else 3.0, "GELU'", " units")


@pytest.mark.parametrize("span", RANGES, ids=str)
def test_gelu_in_float64(span, arch):
    x = torch.linspace(*span, POINTS, dtype=torch.float64)
    gelu, slope = cpp_gelu(x)
    torch.testing.assert_close(gelu, F.gelu(x), rtol=0, atol=4 * torch.finfo(torch.float64).eps * max(map(abs, span)))
    torch.testing.assert_close(slope, slope_truth(x), rtol=0, atol=1e-15)


def test_gelu_at_special_values(arch):
    x = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e-45, 40.0, -40.0, 1e30, -1e30, 3e38, -3e38, math.inf, math.nan])
    rows = x.view(-1, 1)  # a row each: no LayerNorm joins them
    gelu, slope = (torch.full_like(rows, torch.nan) for _ in range(2))
    zero, one = torch.zeros_like(rows), torch.ones_like(rows)
    ops.mlp_in_bwd_(rows, torch.zeros(1), one, zero, one, zero, zero, gelu, slope, None)
    finite = x.abs() <= 3e38
    torch.testing.assert_close(gelu.view(-1)[finite].double(), gelu_truth(x[finite]), rtol=1e-6, atol=1e-38)
    moderate = x.abs() <= 1e30
    torch.testing.assert_close(slope.view(-1)[moderate].double(), slope_truth(x[moderate]), rtol=0, atol=1e-7)
    assert gelu[-2] == math.inf and gelu[-1].isnan() and slope[-1].isnan()


# -- as registered ops

SMALL = Case(classes=4, views=2, dim=8, heads=2, tile_rows=20)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(autocast, recorded):
    for name, arguments in recorded(SMALL, 2, autocast).items():
        for call in arguments:
            torch.library.opcheck(getattr(ops, name).default, call, test_utils=("test_schema", "test_faketensor"))


def test_ops_check_what_they_get(recorded):
    """Memory is written through raw pointers: a tensor of another size or type must not get there."""
    for name, (arguments,) in recorded(SMALL, 1).items():
        op = getattr(ops, name)
        for place, argument in enumerate(arguments):
            if not isinstance(argument, Tensor) or argument.dim() == 0:
                continue
            before, after = arguments[:place], arguments[place + 1 :]
            strided = argument.repeat_interleave(2, dim=-1)[..., ::2]
            for wrong in (argument.half(), argument.flatten()[:1].clone(), strided):
                with pytest.raises(RuntimeError, match=f"gcahng::{name[:4]}"):
                    op(*before, wrong, *after)


def test_sums_of_bfloat16_are_an_error():
    tile, x, square = [1, 2, 1, 0, 0, 0, 1], torch.zeros(2, 4).bfloat16(), torch.zeros(4, 4).bfloat16()
    with pytest.raises(RuntimeError, match="gcahng::edge_start_bwd_: float32 or float64 is needed"):
        ops.edge_start_bwd_(tile, x, square, x.clone())
    with pytest.raises(RuntimeError, match="gcahng::diversity_fwd_: float32 or float64 is needed"):
        ops.diversity_fwd_(tile, square, x, x.clone())


def test_more_views_than_the_mixing_holds():
    z = torch.zeros(65 * 2, 4)
    with pytest.raises(RuntimeError, match="at most 64 samples a class"):
        ops.edge_start_fwd_([1, 65, 1, 0, 1, 1, 2], z, torch.zeros(65 * 65, 4), None)
