"""Whole training steps on a GPU: exact, the same bits again, in memory that does not grow, captured and replayed."""

from __future__ import annotations

import gc

import golden
import on_device
import pytest
import torch
from engine_cases import Case
from torch.profiler import ProfilerActivity, profile

from gcahng.bench.cases import Case as BenchCase
from gcahng.bench.cases import Problem
from gcahng.dispatch import available

pytestmark = pytest.mark.gpu
slow = pytest.mark.slow
implementations = pytest.mark.parametrize("impl", ["torch", "cuda", "triton", "auto"])
few = pytest.mark.parametrize(
    "impl", ["auto", *(pytest.param(name, marks=slow) for name in ("torch", "cuda", "triton"))]
)
CASES = [
    Case(memory="store"),
    Case(memory="hidden", classes=6, views=2, dim=64, layers=1),
    Case(memory="recompute", symmetric=False),
    Case(classes=7, views=2, dim=24, layers=3, heads=3, compat="official"),
]


@pytest.fixture(autouse=True)
def there(request: pytest.FixtureRequest) -> None:
    for part in ("cuda", "triton"):
        reason = available(part, "cuda")
        assert reason is None, reason


@implementations
@pytest.mark.parametrize("case", [CASES[0], *(pytest.param(case, marks=slow) for case in CASES[1:])], ids=str)
def test_against_the_reference_in_float64(case, impl):
    on_device.check_against_reference("cuda", case, impl)


@slow
@implementations
def test_lower_precisions(impl):
    on_device.check_precisions("cuda", impl, ("fp32", "tf32", "bf16"))


@slow
@implementations
def test_at_the_papers_width(impl):
    on_device.check_precisions("cuda", impl, ("fp32", "bf16"), n=81, dim=512)


@slow
@pytest.mark.parametrize("impl", ["cuda", "triton", "auto"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_bits_again(precision, impl):
    on_device.check_step_twice("cuda", impl, precision, n=81, dim=512)


@implementations
@pytest.mark.parametrize("name", [golden.CASES[0], *(pytest.param(name, marks=slow) for name in golden.CASES[1:])])
def test_the_authors_numbers(name, impl):
    on_device.check_golden_generate("cuda", name, impl)
    on_device.check_golden_training("cuda", name, impl)


@few
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=slow)])
def test_memory_does_not_grow(precision, impl):
    problem = Problem(BenchCase(81, 3, 128, 2, impl=impl, precision=precision, device="cuda"))
    held, peaks = [], []
    for _ in range(23):
        torch.cuda.reset_peak_memory_stats()
        problem.step()
        torch.cuda.synchronize()
        gc.collect()
        held.append(torch.cuda.memory_allocated())
        peaks.append(torch.cuda.max_memory_allocated())
    assert set(held[3:]) == {held[2]} and max(peaks[3:]) <= peaks[2], (held, peaks)


@implementations
def test_replayed_cuda_graphs_compute_the_same(impl):
    """GCAHNGLoss(..., cuda_graph=True)"""
    on_device.check_replay("cuda", impl, cuda_graph=True)


@few
def test_cuda_graphs_are_replayed(impl):
    """Both passes of a step and the three steps of the optimizers are one launch each, after the first steps."""
    problem = Problem(BenchCase(24, 3, 32, 2, impl=impl, device="cuda", cuda_graph=True))
    for _ in range(3):
        problem.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        problem.step()
        torch.cuda.synchronize()
    launches = sum(event.count for event in seen.key_averages() if event.key == "cudaGraphLaunch")
    assert launches == 5


@few
def test_captured_passes_share_their_memory(impl):
    """A second kind of batch, hardly smaller than the first, needs no memory for temporaries of its own."""
    problem = Problem(BenchCase(96, 3, 64, 2, impl=impl, device="cuda", cuda_graph=True))
    grown = []
    for rows in (96, 93):
        problem.embeddings, problem.labels = problem.batch(rows)
        before = torch.cuda.memory_reserved()
        for _ in range(3):
            problem.step()
        torch.cuda.synchronize()
        grown.append(torch.cuda.memory_reserved() - before)
    assert grown[1] < grown[0]


@few
def test_a_whole_step_in_a_graph_of_the_callers(impl):
    on_device.check_whole_step("cuda", impl)


@few
def test_two_losses_on_two_streams(impl):
    """Queued without waiting for one another, as apart."""
    cases = [BenchCase(n, 3, 128, 2, impl=impl, device="cuda") for n in (81, 48)]

    def train(problems, streams):
        torch.cuda.synchronize()
        for _ in range(4):
            for problem, stream in zip(problems, streams, strict=True):
                with torch.cuda.stream(stream):
                    problem.step()
        torch.cuda.synchronize()
        return [p.detach().clone() for problem in problems for p in problem.gca.parameters()]

    stream = torch.cuda.current_stream()
    wanted = train([Problem(case) for case in cases], [stream, stream])
    found = train([Problem(case) for case in cases], [torch.cuda.Stream(), torch.cuda.Stream()])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@few
def test_a_step_does_not_wait_for_the_device(impl):
    """Phase 1, where no check of values is due."""
    problem = Problem(BenchCase(24, 3, 32, 2, impl=impl, device="cuda"))
    problem.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.loss().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    problem.gca.generator_step()
