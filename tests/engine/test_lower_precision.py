"""The engine in fp32, under bf16 autocast, and with edges stored in less than it computes in.

The error against the reference in fp64 is at most twice plain PyTorch's (the reference's, at the same precision), plus
a rounding.
"""

from __future__ import annotations

import math

import pytest
import torch
from engine_cases import (
    IMPLEMENTATIONS,
    LOW_CASES,
    WIDE_CASES,
    Case,
    assert_same_keys,
    cancels,
    error,
    moved,
    run_step,
    scale_of,
    truth_of,
)
from torch import Tensor

from gcahng.engine import precision

engines = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def plain_errors(
    case: Case, z: Tensor, labels: Tensor, truth: dict[str, Tensor], dtype: torch.dtype, autocast: torch.dtype | None
) -> dict[str, float]:
    """What the reference is off by in this dtype: the largest of six runs, five of them from weights and embeddings
    that are moved by a rounding. One run alone may be right by luck."""
    generator = torch.Generator().manual_seed(0)
    worst = dict.fromkeys(truth, 0.0)
    for run in range(6):
        gca, x = case.loss("reference", dtype), z.to(dtype)
        if run:
            x = moved(x, autocast or dtype, generator)
            with torch.no_grad():
                for parameter in gca.parameters():
                    parameter.copy_(moved(parameter, autocast or dtype, generator))
        found = run_step(gca, x, labels, autocast=autocast)
        assert_same_keys(found, truth)
        worst = {name: max(worst[name], error(found[name], truth[name])) for name in truth}
    return worst


def assert_as_good_as_plain(
    actual: dict[str, Tensor],
    truth: dict[str, Tensor],
    plain: dict[str, float],
    rows: int,
    *,
    compute: torch.dtype,
    factor: float = 2.0,
) -> None:
    """max|actual - truth| ≤ factor · max|plain - truth| + ½ eps max|truth|, for every tensor.

    Where a gradient cancels (the reference sums n² terms, the engine n): + √n eps of its scale, n roundings of either
    sign. Single numbers, whose errors are a draw each, are taken together, relative to themselves (each by itself over
    many batches: test_errors_over_many_batches).
    """
    assert_same_keys(actual, truth)
    numbers = [name for name, tensor in truth.items() if tensor.dim() == 0 and tensor.is_floating_point()]
    plain_number = max(plain[name] / scale_of(name, truth) for name in numbers)
    for name, tensor in truth.items():
        assert actual[name].isfinite().all(), name
        scale = scale_of(name, truth)
        off, allowed = error(actual[name], tensor), factor * plain[name]
        if cancels(name):
            allowed += math.sqrt(rows) * torch.finfo(compute).eps * scale
        elif name in numbers:
            allowed = (factor * plain_number + torch.finfo(actual[name].dtype).eps / 2) * scale
        elif tensor.is_floating_point():
            allowed += torch.finfo(actual[name].dtype).eps / 2 * scale
        assert off <= allowed, f"{name}: off by {off:.3g}, allowed {allowed:.3g}, of {scale:.3g}"


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", LOW_CASES, ids=str)
def test_step_in_lower_precision(case, autocast, tiles):
    tiles(case)
    z, labels = case.batch(dtype=torch.float32)
    truth = run_step(truth_of(case.loss("reference")), z.double(), labels)
    plain = plain_errors(case, z, labels, truth, torch.float32, autocast)
    for impl in IMPLEMENTATIONS:
        found = run_step(case.loss(impl, torch.float32), z, labels, autocast=autocast)
        assert found["loss"].dtype is torch.float32 and found["dz"].dtype is torch.float32
        assert_as_good_as_plain(found, truth, plain, len(z), compute=autocast or torch.float32)


TRITON_CASES = [
    Case(),
    Case(classes=3, views=2, layers=3, memory="recompute"),  # edges in the slot of those that they come from
    pytest.param(LOW_CASES[1], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", TRITON_CASES, ids=str)
def test_triton_step_in_single_precision(case, tiles):
    """Its own products; in the interpreter where there is no GPU, which computes bf16 wrongly."""
    tiles(case)
    z, labels = case.batch(dtype=torch.float32)
    truth = run_step(truth_of(case.loss("reference")), z.double(), labels)
    plain = plain_errors(case, z, labels, truth, torch.float32, None)
    found = run_step(case.loss("triton", torch.float32), z, labels)
    assert_as_good_as_plain(found, truth, plain, len(z), compute=torch.float32)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case", [LOW_CASES[2].but(dim=32), pytest.param(LOW_CASES[1], marks=pytest.mark.slow)], ids=str
)
def test_errors_over_many_batches(case, autocast, tiles):
    """What single batches hide: over batches, the geometric mean of a tensor's error, and a rounding of its own dtype,
    is at most twice that of plain PyTorch's."""
    tiles(case)
    batches = 8
    ratios = {impl: {} for impl in IMPLEMENTATIONS}
    for seed in range(batches):
        z, labels = case.batch(seed, torch.float32)
        truth = run_step(truth_of(case.loss("reference")), z.double(), labels)
        plain = run_step(case.loss("reference", torch.float32), z, labels, autocast=autocast)
        for impl, found in ratios.items():
            actual = run_step(case.loss(impl, torch.float32), z, labels, autocast=autocast)
            for name in (name for name in truth if truth[name].is_floating_point() and not cancels(name)):
                rounding = torch.finfo(torch.float32).eps / 2 * scale_of(name, truth)
                ours, theirs = (error(x[name], truth[name]) + rounding for x in (actual, plain))
                found[name] = found.get(name, 0.0) + math.log(ours / theirs) / batches
    for impl, found in ratios.items():
        worst = max(found, key=found.get)
        times = math.exp(found[worst])
        assert times <= 2, f"{impl}: {worst} is {times:.2f} times as far off as plain PyTorch's"


EDGE_CASES = [
    Case(tile_rows=40),
    Case(symmetric=False, memory="hidden"),
    pytest.param(Case(classes=6, views=4, dim=64, memory="hidden", tile_rows=130), marks=pytest.mark.slow),
    pytest.param(Case(classes=7, views=2, dim=24, layers=4, heads=3, tile_rows=40), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", EDGE_CASES, ids=str)
def test_stored_edges_in_lower_precision(case, tiles):
    """Edges are rounded a few times a layer, all else is not: no more off than plain PyTorch that rounds everything."""
    tiles(case)
    z, labels = case.batch(dtype=torch.float32)
    truth = run_step(truth_of(case.loss("reference")), z.double(), labels)
    for dtype, edges, autocast in (
        (torch.float64, torch.float32, None),
        (torch.float64, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ):
        plain = plain_errors(case, z, labels, truth, torch.float32, autocast)
        exact = run_step(case.loss("torch", dtype), z.to(dtype), labels)
        for impl in IMPLEMENTATIONS:
            found = run_step(case.loss(impl, dtype, edge_dtype=edges), z.to(dtype), labels)
            assert_as_good_as_plain(found, truth, plain, len(z), compute=edges, factor=1.0)
            rounding = torch.finfo(edges).eps * scale_of("dz", exact)
            assert error(found["dz"], exact["dz"]) > 1e-3 * rounding, "edges are not rounded"


@pytest.mark.parametrize("case", EDGE_CASES, ids=str)
def test_stored_edges_in_bfloat16_under_autocast(case, tiles):
    tiles(case)
    z, labels = case.batch(dtype=torch.float32)
    truth = run_step(truth_of(case.loss("reference")), z.double(), labels)
    plain = plain_errors(case, z, labels, truth, torch.float32, torch.bfloat16)
    for impl in IMPLEMENTATIONS:
        gca = case.loss(impl, torch.float32, edge_dtype=torch.bfloat16)
        found = run_step(gca, z, labels, autocast=torch.bfloat16)
        assert_as_good_as_plain(found, truth, plain, len(z), compute=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [WIDE_CASES[0], WIDE_CASES[1]], ids=str)
def test_wide_step_in_lower_precision(case, autocast, tiles):
    test_step_in_lower_precision(case, autocast, tiles)


# The classifier is plain PyTorch: it obeys autocast, and its weights are held here.
HELD = {"classifier_lr": 0.0, "classifier_weight_decay": 0.0}


def assert_same_but_classifier(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert_same_keys(one, other)
    for name in one.keys() - {"J_cls"}:
        assert torch.equal(one[name], other[name]), name


@engines
def test_float64_ignores_autocast(impl):
    case = Case()
    z, labels = case.batch()
    under, plain = (run_step(case.loss(impl, **HELD), z, labels, autocast=low) for low in (torch.bfloat16, None))
    assert_same_but_classifier(under, plain)


@engines
def test_half_precision_autocast_keeps_float32(impl):
    """Gradients are formed in the forward, before any loss scaling: they would vanish in fp16. It says so once."""
    case = Case()
    z, labels = case.batch(dtype=torch.float32)
    precision._warn_of_fp16.cache_clear()
    with pytest.warns(UserWarning, match="fp16 autocast: the engine's products stay in float32") as caught:
        under = run_step(case.loss(impl, torch.float32, **HELD), z, labels, autocast=torch.float16)
    assert len([w for w in caught if "fp16" in str(w.message)]) == 1
    assert_same_but_classifier(under, run_step(case.loss(impl, torch.float32, **HELD), z, labels))
