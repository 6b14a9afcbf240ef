"""The planner against what the engine allocates and multiplies, and against itself."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from observed import observe
from tiers import few, paired

from gcahng.bench.cases import Case, Problem
from gcahng.bench.memory import plan_size
from gcahng.engine import plan
from gcahng.engine.plan import MODES, StepSize
from gcahng.engine.schedule import default_tile_rows, make_schedule
from gcahng.engine.weights import generator_names, metric_names, parameter_names
from gcahng.errors import UserError
from gcahng.nn import GraphNetwork

SIZE = StepSize(batch=129, dim=512, layers=2, views=3, classes=100)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layers", few([2, 1, 3]))
@pytest.mark.parametrize("memory", MODES)
def test_every_product_is_counted(memory: str, layers: int, symmetric: bool) -> None:
    case = Case(15, 3, 16, layers, classes=37, impl="cpp", memory=memory, symmetric=symmetric)
    size = plan_size(case)
    _, products = observe(Problem(case))
    rows, mixes = size.rows, case.batch**2 // case.views  # one tile
    assert plan.tiling(size, memory).rows == rows
    edges = sum(a * b * c for a, b, c in products if rows in (a, b, c))
    negatives = sum(a * b * c for a, b, c in products if mixes in (a, b, c))
    found = plan.work(size, memory)
    assert (edges, negatives) == (found.edges, found.negatives)
    assert edges == plan.edge_products(layers, memory) * rows * case.dim**2
    rest = sum(a * b * c for a, b, c in products) - edges - negatives
    # The classifier's own loss is no part of a pass, attention is no matrix product of torch's.
    attention = 14 * layers * case.batch**2 * case.dim
    expected = found.nodes - 2 * case.batch * case.classes * case.dim - attention
    assert rest == pytest.approx(expected, rel=0.01)


def test_the_formulas_of_the_products() -> None:
    assert [plan.edge_products(layers, "store") for layers in (1, 2, 3)] == [48, 112, 176]
    assert [plan.floor_products(layers, True) for layers in (1, 2, 3)] == [48, 112, 176]
    assert [plan.floor_products(layers, False) / 2 for layers in (1, 2)] == [20.5, 47.5]
    assert [plan.edge_products(layers, "hidden") for layers in (1, 2)] == [44, 100]


MEMORY_CASES = [
    Case(96, 3, 64, 2, 200, "cpp", "bf16"),
    Case(240, 3, 64, 2, 200, "cpp", "fp32"),
    Case(120, 4, 32, 3, 2000, "cpp", "fp32"),
    Case(96, 2, 64, 1, 200, "cpp", "fp32", edge_dtype=torch.bfloat16),
    Case(72, 3, 64, 2, 200, "cpp", "fp32", symmetric=False),
    Case(72, 3, 64, 2, 200, "torch", "fp32"),
    Case(72, 3, 64, 2, 200, "torch", "bf16"),
    Case(96, 3, 64, 2, 200, "cpp", "bf16", edge_dtype=torch.bfloat16),
]


@pytest.mark.parametrize(("case", "memory"), paired(MEMORY_CASES, MODES), ids=lambda x: str(getattr(x, "name", x)))
def test_estimates_agree_with_what_tensors_hold(case: Case, memory: str) -> None:
    case = replace(case, memory=memory)
    size = plan_size(case)
    peaks, _ = observe(Problem(case))
    # observe() looks at the passes alone: no state is given back, no gradient scaled.
    state = plan.parameters(size) * size.accumulate.itemsize
    moments = [terms for name, terms in plan._moments(size, memory).items() if not name.startswith("gradients")]
    expected = state + max(sum(terms.values()) for terms in moments)
    assert expected == pytest.approx(max(peaks), rel=0.15)


def test_parameters_are_counted_exactly() -> None:
    for dim, layers, classes in ((16, 1, 7), (32, 3, 50)):
        size = StepSize(6, dim, layers, 3, classes)
        named = dict(GraphNetwork(dim, classes, layers=layers).named_parameters())
        counts = [sum(named[name].numel() for name in names(layers)) for names in (generator_names, metric_names)]
        assert counts == [plan.generator_parameters(size), plan.metric_parameters(size)]
        graph = sum(named[name].numel() for name in parameter_names(layers))
        assert plan.parameters(size) == graph + (dim + 1) * classes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("views", [2, 3, 8])
@pytest.mark.parametrize("memory", MODES)
def test_tiling_agrees_with_the_schedule(views: int, symmetric: bool, memory: str) -> None:
    for classes in (2, 3, 8, 31, 34, 43, 64, 127, 128):
        for dim, compute in ((512, torch.float32), (64, torch.float32), (1024, torch.bfloat16)):
            size = StepSize(classes * views, dim, 2, views, 200, compute, symmetric=symmetric)
            rows = default_tile_rows(dim, compute, memory)
            schedule = make_schedule(classes, views, symmetric=symmetric, tile_rows=rows)
            mixes = max(t.classes * views * (2 * t.offsets - t.mirrored) for t in schedule.tiles)
            found = plan.tiling(size, memory)
            assert (size.rows, found.rows, found.reach) == (schedule.rows, schedule.tile_rows, schedule.reach)
            assert mixes <= found.mixes <= 1.1 * mixes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_of_a_batch_are_counted(count: int, symmetric: bool) -> None:
    for classes in (2, 31, 64, 128):
        size = StepSize(classes * 3, 512, 2, 3, 200, symmetric=symmetric, ranks=count)
        options = {"symmetric": symmetric, "tile_rows": default_tile_rows(512, torch.float32)}
        ranks = [SimpleNamespace(rank=rank, count=count) for rank in range(count)]
        shares = [make_schedule(classes, 3, **options, ranks=one) for one in ranks]
        largest = max(share.rows for share in shares)
        assert largest <= size.rows <= largest + 9 * classes  # of two bands, each rounded up to a class
        assert max(share.tile_rows for share in shares) <= plan.tiling(size, "store").rows
        if count <= classes // 2:
            assert size.rows < 1.3 * sum(share.rows for share in shares) / count
            assert plan.expected_bytes(size, "store") < plan.expected_bytes(replace(size, ranks=1), "store")
            assert plan.work(size, "store").edges < 1.3 * plan.work(replace(size, ranks=1), "store").edges / count


@pytest.mark.parametrize("memory", MODES)
def test_more_takes_more(memory: str) -> None:
    # A small batch splits into tiles of uneven size, which is what recompute's memory goes by.
    sizes = [replace(SIZE, batch=3 * 2**k, classes=2**k) for k in range(7 if memory == "recompute" else 5, 12)]
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        assert plan.expected_bytes(before, memory) < plan.expected_bytes(after, memory)
        assert plan.work(before, memory).total < plan.work(after, memory).total
    # With more classes the state grows by more than the peak beyond it, whose gradients are the state's.
    for change in ({"layers": 3}, {"dim": 1024}, {"classes": 11318}):
        base, more = (plan.state_bytes(s) + plan.expected_bytes(s, memory) for s in (SIZE, replace(SIZE, **change)))
        assert more > base


def test_modes_are_in_order_and_recompute_keeps_no_edges() -> None:
    large = replace(SIZE, batch=1536, classes=512)
    hidden, store, recompute = (plan.expected_bytes(large, memory) for memory in MODES)
    assert hidden > 2 * store > 10 * recompute
    assert not any(name.startswith(("edges", "hidden")) for name in plan.expected_terms(large, "recompute"))
    half = plan.expected_bytes(replace(large, edge_dtype=torch.bfloat16), "store")
    assert half < 0.6 * store


def test_edges_in_bf16_have_no_copy_in_any_fused_stages() -> None:
    low = torch.bfloat16
    sizes = [
        StepSize(96, 64, 2, 3, 200, compute=low, edge_dtype=low, stages=stages, device="cuda")
        for stages in ("fused", "cuda", "triton", "cuda+triton")
    ]
    wide = replace(sizes[0], edge_dtype=torch.float32)
    for memory in MODES:
        (bytes_,) = {plan.expected_bytes(size, memory) for size in sizes}
        assert bytes_ < plan.expected_bytes(wide, memory)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("limit", [10**9, 16 * 10**9])
def test_the_largest_batch_fits_and_the_next_does_not(memory: str, limit: int) -> None:
    found = plan.largest_batch(SIZE, memory, limit)
    assert found is not None and found % 3 == 0

    def taken(batch: int) -> int:
        size = replace(SIZE, batch=batch, classes=max(100, batch // 3))
        return plan.state_bytes(size) + plan.expected_bytes(size, memory)

    assert taken(found) <= limit < taken(found + 3)


def test_no_batch_fits_in_less_than_the_state() -> None:
    assert plan.largest_batch(SIZE, "recompute", plan.state_bytes(SIZE)) is None


def test_the_choice_follows_free_memory() -> None:
    hidden, store = (plan.expected_bytes(SIZE, memory) for memory in ("hidden", "store"))
    assert plan.choose_memory(SIZE, 2 * hidden + 2) == "hidden"
    assert plan.choose_memory(SIZE, 2 * hidden - 2) == "store"
    assert plan.choose_memory(SIZE, int(store / 0.8) + 2) == "store"
    assert plan.choose_memory(SIZE, int(store / 0.8) - 2) == "recompute"
    assert plan.choose_memory(SIZE, None) == "store"


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="batch is 10 and views is 3"):
        StepSize(10, 16, 1, 3, 10)
    with pytest.raises(UserError, match="edge_memory is 'auto'"):
        plan.expected_terms(SIZE, "auto")
    with pytest.raises(UserError, match="edge_memory is 'x'"):
        plan.work(SIZE, "x")
