"""What a step holds: nothing of size n²·D that was not asked for, no hidden vectors of all edges, no logits of all
negatives; every allocation is seen, those inside of C++ too."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from engine_cases import IMPLEMENTATIONS, Case, assert_exact, run_step
from tiers import few
from torch.profiler import ProfilerActivity, profile

from gcahng.engine.plan import StepSize
from gcahng.engine.schedule import make_schedule
from gcahng.engine.stages.mix_index import mix_index

CASE = Case(classes=24, views=2, dim=32, num_classes=30, tile_rows=96)
FLOAT = 4

engines = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def allocations(call: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) on the CPU, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def step_allocations(case: Case, impl: str) -> list[int]:
    """Of a second step: the first one also makes what lasts (optimizer states, memory that is used again)."""
    gca = case.loss(impl, torch.float32)
    z, labels = case.batch(dtype=torch.float32)
    run_step(gca, z, labels)
    return allocations(lambda: run_step(gca, z, labels))


def most_at_once(events: list[int], at_least: int) -> int:
    """How many allocations of at least this size live side by side."""
    live = most = 0
    for size in events:
        if abs(size) >= at_least:
            live += 1 if size > 0 else -1
            most = max(most, live)
    return most


def peak(events: list[int]) -> int:
    live = most = 0
    for size in events:
        live += size
        most = max(most, live)
    return most


def edge_rows(case: Case) -> int:
    return make_schedule(case.classes, case.views, symmetric=case.symmetric, tile_rows=case.tile_rows or 8192).rows


@pytest.fixture
def small_tiles(tiles):
    tiles(CASE)


def test_allocations_are_seen(small_tiles):
    """By the reference this file's limits are passed: n²·4D, n²·D, and logits of all negatives."""
    events = step_allocations(CASE, "reference")
    n = CASE.classes * CASE.views
    assert max(events) >= FLOAT * n * n * 4 * CASE.dim
    assert most_at_once(events, FLOAT * n * n * CASE.dim) > 10
    many = CASE.but(num_classes=3000)
    assert max(step_allocations(many, "reference")) >= FLOAT * n * many.classes * 3000


@engines
@pytest.mark.parametrize("symmetric", few([True, False]))
def test_recompute_holds_no_edges(impl, symmetric, small_tiles):
    """Hidden vectors of a tile or of the nodes are the largest, n×n scalars aside."""
    case = CASE.but(memory="recompute", symmetric=symmetric)
    n, dim = case.classes * case.views, case.dim
    events = step_allocations(case, impl)
    hidden, scalars = max(n, case.tile_rows) * 4 * dim, case.heads * n * (n + 1)
    assert max(events) <= FLOAT * max(hidden, scalars, 4 * dim * dim)
    assert max(events) < FLOAT * n * n * dim / 4


@pytest.mark.parametrize("impl", [pytest.param("torch", marks=pytest.mark.slow), "cpp"])
def test_recompute_grows_as_n(impl, small_tiles):
    """But for n×n scalars: attention (per head, forward and gradients) and its mask, logits of J_syn."""
    n = CASE.classes * CASE.views
    small, large = (
        peak(step_allocations(CASE.but(memory="recompute", num_classes=60, classes=k * CASE.classes), impl))
        for k in (1, 2)
    )
    scalars = FLOAT * (2 * n) ** 2 * 4 * CASE.heads
    assert large <= 2 * small + scalars
    assert scalars < FLOAT * (2 * n) ** 2 * CASE.dim, "edges would not pass for scalars"


@engines
@pytest.mark.parametrize(
    ("layers", "symmetric"), few([pytest.param(1, True), pytest.param(2, False), pytest.param(3, True)])
)
def test_store_holds_one_vector_a_layer_and_one_gradient(impl, layers, symmetric, small_tiles):
    case = CASE.but(layers=layers, symmetric=symmetric)
    events = step_allocations(case, impl)
    edges = FLOAT * edge_rows(case) * case.dim
    assert max(events) == edges
    assert most_at_once(events, edges // 2) == layers + 1


@engines
def test_store_in_bfloat16_halves_the_edges(impl, small_tiles):
    gca = CASE.loss(impl, torch.float32, edge_dtype=torch.bfloat16)
    z, labels = CASE.batch(dtype=torch.float32)
    run_step(gca, z, labels)
    events = allocations(lambda: run_step(gca, z, labels))
    edges = FLOAT * edge_rows(CASE) * CASE.dim
    assert max(events) == edges // 2
    assert most_at_once(events, edges // 2) == CASE.layers + 1


@engines
def test_hidden_holds_the_hidden_layer_too(impl, small_tiles):
    case = CASE.but(memory="hidden")
    events = step_allocations(case, impl)
    edges = FLOAT * edge_rows(case) * case.dim
    assert max(events) == 4 * edges
    assert most_at_once(events, 4 * edges) == case.layers
    assert most_at_once(events, edges) <= 2 * case.layers + 1


@engines
@pytest.mark.parametrize("chosen", ["store", "hidden", "recompute"])
def test_auto_asks_by_the_size_of_the_step_and_the_memory_there_is(impl, chosen, monkeypatch):
    asked, used = [], []

    def choose(size: StepSize, free: int | None) -> str:
        asked.append((size, free))
        return chosen

    def rows(dim: int, compute: torch.dtype, memory: str, device: str) -> int:
        used.append(memory)
        return 96

    monkeypatch.setattr("gcahng.engine.prepare.free_memory", lambda device: 12345 if device.type == "cpu" else None)
    monkeypatch.setattr("gcahng.engine.prepare.choose_memory", choose)
    monkeypatch.setattr("gcahng.engine.prepare.default_tile_rows", rows)
    case = CASE.but(memory="auto", symmetric=False, layers=3)
    run_step(
        case.loss(impl, torch.float32, edge_dtype=torch.bfloat16),
        *case.batch(dtype=torch.float32),
        autocast=torch.bfloat16,
    )
    low = torch.bfloat16
    size = StepSize(48, 32, 3, 2, 30, low, torch.float32, low, symmetric=False, stages=impl, device="cpu")
    assert asked == [(size, 12345)] * 2 and used == [chosen] * 2


@engines
@pytest.mark.parametrize("memory", ["store", "hidden", "recompute"])
def test_a_step_leaves_nothing(impl, memory):
    """All that a step holds goes with it, not when Python's collector comes: a cycle would keep a batch's edges."""
    case = CASE.but(memory=memory, tile_rows=None)
    gc.collect()
    gc.disable()
    try:
        assert sum(step_allocations(case, impl)) == 0
    finally:
        gc.enable()


@engines
@pytest.mark.parametrize("memory", ["store", "hidden", "recompute"])
def test_nothing_of_the_edges_outlives_the_forward(impl, memory):
    """What the backward keeps are gradients, of the weights and of the embeddings."""
    case = CASE.but(memory=memory, dim=16, classes=48, num_classes=50, tile_rows=None)
    gca = case.loss(impl, torch.float32)
    z, labels = case.batch(dtype=torch.float32)
    run_step(gca, z, labels)
    kept: list[torch.Tensor] = []
    events = allocations(lambda: kept.append(gca(z.requires_grad_(), labels)))
    weights = sum(p.numel() for p in gca.graph_network.parameters())
    limit = FLOAT * (weights + 6 * z.numel())
    assert sum(events) <= limit < FLOAT * edge_rows(case) * case.dim


@engines
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_logits_of_a_tile_at_most(impl, memory, small_tiles):
    case = CASE.but(num_classes=3000, memory=memory)
    n = case.classes * case.views
    schedule = make_schedule(case.classes, case.views, symmetric=True, tile_rows=case.tile_rows)
    mixes = max(len(mix_index(schedule, tile, torch.device("cpu")).view) for tile in schedule.tiles)
    assert max(step_allocations(case, impl)) <= FLOAT * max(mixes, n, case.dim) * case.num_classes
    assert max(mixes, n, case.dim) < n * case.classes / 10


@pytest.mark.parametrize(("impl", "memory"), [("torch", "store"), ("cpp", "recompute")])
def test_logits_a_few_rows_at_a_time(impl, memory, monkeypatch):
    """Where a tile alone has too many of them, which changes no result."""
    case = CASE.but(num_classes=3000, memory=memory, tile_rows=None)  # all edges in one tile
    monkeypatch.setattr("gcahng.engine.generator_pass.LOGITS_AT_ONCE", 7 * case.num_classes + 1)
    n = case.classes * case.views
    logits, edges = max(n, case.dim, 7) * case.num_classes, edge_rows(case) * 4 * case.dim
    assert (
        max(step_allocations(case, impl))
        <= FLOAT * max(logits, edges)
        < FLOAT * n * case.classes * case.num_classes / 10
    )
    z, labels = case.batch()
    assert_exact(run_step(case.loss(impl), z, labels), run_step(case.loss("reference"), z, labels))
