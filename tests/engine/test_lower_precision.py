"""The engine in fp32, under bf16 autocast, and with edges stored in less than it computes in.

Over several draws of a problem, its errors against the reference in fp64 are those of plain PyTorch (the reference at
the same precision) but for chance, and at most twice as large in the mean over all tensors
(`gcahng.testing.compare.assert_as_exact_as_plain`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from emulator.ops import compile_all
from engine_cases import IMPLEMENTATIONS, LOW_CASES, WIDE_CASES, Case, assert_same_keys, error, run_step, scale_of
from error_draws import Variant, assert_errors, draw_errors
from stages.backends import EMULATED
from tiers import few
from torch import Tensor

from gcahng.engine import precision, prepare

LOW = torch.bfloat16
engines = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", few(LOW_CASES, 2), ids=str)
def test_step_in_lower_precision(case, autocast, tiles):
    tiles(case)
    variants = {impl: Variant(impl, autocast=autocast) for impl in IMPLEMENTATIONS}
    errors = draw_errors(case, variants | {"plain": Variant("reference", autocast=autocast)})
    for impl, variant in variants.items():
        assert_errors(case, variant, errors[impl], errors["plain"])


SMALL = Case(classes=3, views=2)
RECOMPUTED = Case(classes=3, views=2, layers=3, memory="recompute")  # edges in the slot of those that they come from
# Each mode of memory in one dtype: what a kernel does in the other is tested in tests/stages.
TRITON_CASES = [
    pytest.param(SMALL, torch.bfloat16, id="store-bfloat16"),
    pytest.param(RECOMPUTED, None, id="recompute-float32"),
    pytest.param(Case(), None, marks=pytest.mark.slow, id="more-float32"),
    pytest.param(Case(), torch.bfloat16, marks=pytest.mark.slow, id="more-bfloat16"),
    pytest.param(RECOMPUTED, torch.bfloat16, marks=pytest.mark.slow, id="recompute-bfloat16"),
    pytest.param(LOW_CASES[1], None, marks=pytest.mark.slow, id="apart-float32"),
    pytest.param(LOW_CASES[1], torch.bfloat16, marks=pytest.mark.slow, id="apart-bfloat16"),
]


@pytest.mark.simulated
@pytest.mark.parametrize(("case", "autocast"), TRITON_CASES)
def test_triton_step_in_lower_precision(case, autocast, tiles, edges=None):
    """Its own products, in one draw since the interpreter is slow."""
    tiles(case)
    triton = Variant("triton", autocast=autocast, edge_dtype=edges, draws=1)
    errors = draw_errors(case, {"triton": triton, "plain": Variant("reference", autocast=autocast)})
    assert_errors(case, triton, errors["triton"], errors["plain"])


@pytest.mark.simulated
@pytest.mark.parametrize("case", [SMALL, pytest.param(RECOMPUTED, marks=pytest.mark.slow)], ids=str)
def test_triton_step_with_narrow_edges(case, tiles):
    test_triton_step_in_lower_precision(case, LOW, tiles, LOW)


@pytest.mark.simulated
@pytest.mark.parametrize("products", ["library", "triton"])
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_cuda_step_with_narrow_edges(memory, products, tiles, monkeypatch):
    """The kernels of CUDA C++ in the emulator, beside the library's products and beside Triton's."""
    case = Case(classes=3, views=2, memory=memory)
    tiles(case)
    compile_all()
    emulated = replace(EMULATED, seed=0)
    monkeypatch.setattr(type(emulated), "triton_products", products == "triton")
    stands_for_cpp = partial(patch.object, prepare, "ops_of", lambda _: emulated)
    cuda = Variant("cpp", autocast=LOW, edge_dtype=LOW, draws=1, fault=stands_for_cpp)
    errors = draw_errors(case, {"cuda": cuda, "plain": Variant("reference", autocast=LOW)})
    assert_errors(case, cuda, errors["cuda"], errors["plain"])


EDGE_CASES = [
    Case(tile_rows=40),
    Case(symmetric=False, memory="hidden"),
    pytest.param(Case(classes=6, views=4, dim=64, memory="hidden", tile_rows=130), marks=pytest.mark.slow),
    pytest.param(Case(classes=7, views=2, dim=24, layers=4, heads=3, tile_rows=40), marks=pytest.mark.slow),
]
# What is computed in, what edges are stored in, and plain PyTorch's autocast.
STORED = [
    (torch.float64, torch.float32, None),
    (torch.float64, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize("case", few(EDGE_CASES), ids=str)
def test_stored_edges_in_lower_precision(case, tiles):
    """Edges are rounded a few times a layer, all else is not: no more off than plain PyTorch that rounds everything."""
    tiles(case)
    for autocast in (None, torch.bfloat16):
        variants = {
            (impl, dtype): Variant(impl, dtype, edge_dtype=edges)
            for impl in IMPLEMENTATIONS
            for dtype, edges, low in STORED
            if low is autocast
        }
        errors = draw_errors(case, variants | {"plain": Variant("reference", autocast=autocast)})
        for key, variant in variants.items():
            assert_errors(case, variant, errors[key], errors["plain"], factor=1.0)


@pytest.mark.parametrize("case", few(EDGE_CASES), ids=str)
def test_stored_edges_are_rounded(case, tiles):
    tiles(case)
    z, labels = case.batch(dtype=torch.float32)
    for dtype, edges, _ in STORED:
        exact = run_step(case.loss("torch", dtype), z.to(dtype), labels)
        for impl in IMPLEMENTATIONS:
            found = run_step(case.loss(impl, dtype, edge_dtype=edges), z.to(dtype), labels)
            rounding = torch.finfo(edges).eps * scale_of("dz", exact)
            assert error(found["dz"], exact["dz"]) > 1e-3 * rounding, "edges are not rounded"


@pytest.mark.thorough
@pytest.mark.parametrize("case", few(EDGE_CASES), ids=str)
def test_stored_edges_in_bfloat16_under_autocast(case, tiles):
    tiles(case)
    variants = {i: Variant(i, edge_dtype=torch.bfloat16, autocast=torch.bfloat16) for i in IMPLEMENTATIONS}
    errors = draw_errors(case, variants | {"plain": Variant("reference", autocast=torch.bfloat16)})
    for impl, variant in variants.items():
        assert_errors(case, variant, errors[impl], errors["plain"])


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
