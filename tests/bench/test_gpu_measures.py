"""What benchmarks/gpu.py measures, on the CPU: steps, stages, and what follows from the figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import _gpu_errors
import _gpu_stages
import _gpu_step
import _gpu_tables
import pytest
import torch
from gpu_cases import COPY, RATES, empty, gpu, nothing, small_stage, small_step, steps_of

from gcahng.bench.agreement import Agreement
from gcahng.bench.cases import Case, Problem
from gcahng.engine.stages.mlp_in import FusedMlpIn
from gcahng.engine.stages.norm_gelu import FusedNormGelu

# -- steps


@pytest.mark.thorough
def test_steps_have_times_ratios_and_a_check() -> None:
    rows = steps_of(small_step())
    assert list(rows) == ["reference fp32", "cpp fp32 store", "torch fp32 store"]
    for name, row in rows.items():
        assert row["step_s"]["median"] > 0 and row["checked_at"] == 12 and row["disagrees"] is None
        assert set(row["ratios"]) == (set() if name == "reference fp32" else {"reference fp32"})
    assert rows["cpp fp32 store"]["expected_bytes"] > 0


@pytest.mark.thorough
def test_steps_that_run_out_of_memory_are_kept(monkeypatch) -> None:
    step = Problem.step

    def short(problem: Problem) -> Any:
        if problem.case.impl == "cpp" and problem.case.memory == "store":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        return step(problem)

    monkeypatch.setattr(_gpu_step, "_checks", lambda item, cases, doing: {c.name: (12, None) for c in cases})
    monkeypatch.setattr(Problem, "step", short)
    rows = steps_of(small_step())
    row = rows["cpp fp32 store"]
    assert row["failed"] == "out of memory" and row["step_s"] is None and row["ratios"] == {}
    assert rows["cpp fp32 recompute"]["step_s"] is not None, "the mode that may fit is tried"
    assert rows["torch fp32 store"]["step_s"] is not None
    found = empty() | {"step": [row | {"item": 0} for row in rows.values()]}
    assert "| cpp fp32 store | out of memory |" in gpu.report(found)
    assert not gpu._went_wrong(found)


@pytest.mark.thorough
def test_a_step_that_disagrees_has_no_ratio(monkeypatch) -> None:
    right = FusedMlpIn.backward

    def wrong(*arguments: Any) -> Any:
        g, dh = right(*arguments)
        return g, dh.mul_(1.001)

    monkeypatch.setattr(FusedMlpIn, "backward", wrong)
    rows = steps_of(small_step())
    row = rows["cpp fp32 store"]
    assert "is off by" in row["disagrees"] and row["ratios"] == {} and row["share_of_floor"] is None
    assert rows["torch fp32 store"]["ratios"]
    found = empty() | {"step": [row | {"item": 0} for row in rows.values()]}
    assert gpu._went_wrong(found) and "No ratio for cpp fp32 store at n = 12, L = 1: " in gpu.report(found)


@pytest.mark.thorough
def test_a_step_is_checked_where_the_reference_fits(monkeypatch) -> None:
    monkeypatch.setattr(_gpu_step, "free_memory", lambda device: _gpu_step.TRUTH_BYTES * 15**2 * 8)
    case = Case(24, 3, 8, 1, impl="torch")
    assert _gpu_step._size_of_check(small_step(n=24), case) == 15
    assert _gpu_step._size_of_check(small_step(n=24, largest_check=12), case) == 12
    right = _gpu_step.Agreement

    def short(size: Case) -> Agreement:
        if size.batch > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(size)

    monkeypatch.setattr(_gpu_step, "Agreement", short)
    assert _gpu_step._check(24, [case], nothing) == {case.name: (12, None)}, "again at less, where it did not fit"
    monkeypatch.setattr(_gpu_step, "Agreement", lambda size: short(replace(size, batch=99)))
    n, reason = _gpu_step._check(24, [case], nothing)[case.name]
    assert n == 12 and reason == "cannot be checked: out of memory"


def test_failures_are_one_line_and_a_lost_device_ends_it() -> None:
    failed: dict[str, str] = {}
    with _gpu_errors.kept(failed, "a", nothing):
        raise ValueError("no such kernel\nand much more")
    assert failed == {"a": "ValueError: no such kernel"}
    with pytest.raises(_gpu_errors.Fatal, match="illegal"), _gpu_errors.kept(failed, "b", nothing):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with _gpu_errors.kept(failed, "c", nothing):
        raise RuntimeError("CUDA error: out of memory")
    assert failed["c"] == "out of memory"


# -- stages


@pytest.mark.thorough
def test_a_stage_that_disagrees_has_no_share(monkeypatch) -> None:
    right = FusedNormGelu.forward

    def wrong(*arguments: Any) -> Any:
        e = right(*arguments)
        e.full.mul_(1.001)
        return e

    def rows_now() -> dict[tuple[str, str], dict[str, Any]]:
        rows = _gpu_stages.measure(small_stage("norm_gelu"), nothing)
        _gpu_stages.add_shares(rows, RATES, COPY)
        return {(row["kind"], row["impl"]): row for row in rows}

    assert all(row["share"] > 0 for row in rows_now().values())
    monkeypatch.setattr(FusedNormGelu, "forward", wrong)
    rows = rows_now()
    for kind in ("stage", "op"):
        assert "is off by" in rows[kind, "cpp"]["disagrees"] and rows[kind, "cpp"]["share"] is None
    assert rows["stage", "torch"]["share"] > 0


def test_shares_and_triton_against_cuda() -> None:
    def row(kind: str, impl: str, seconds: float, **more: Any) -> dict[str, Any]:
        times = {"median": seconds, "p20": seconds, "p80": seconds}
        return {
            "kind": kind, "stage": "mlp_in", "name": "mlp_in" if kind == "stage" else "mlp_in_fwd_", "impl": impl,
            "precision": "bf16", "time_s": times, "disagrees": None, "failed": None, "rows": 9, "D": 8,
        } | more  # fmt: skip

    rows = [row("stage", "triton", 4.0, flops=int(2e12)), row("op", "triton", 3.0, bytes=int(1e12))]
    rows += [row("op", "cuda", 2.0, bytes=int(1e12)), row("stage", "cuda", 8.0, flops=int(2e12))]
    _gpu_stages.add_shares(rows, RATES, COPY)
    assert [r["share"] for r in rows] == pytest.approx([2 / 4, 1 / 3, 1 / 2, 2 / 8])
    assert [r["triton_over_cuda"] for r in rows] == [0.5, 1.5, None, None]
    rows[2]["disagrees"] = "it is wrong"
    _gpu_stages.add_shares(rows, RATES, COPY)
    assert rows[1]["triton_over_cuda"] is None
    assert "| mlp_in_fwd_ in mlp_in | bf16 | triton |" in _gpu_tables._stages(rows, "op")


def test_triton_stages_in_the_interpreter() -> None:
    rows = _gpu_stages.measure(small_stage("norm_gelu", impls=["triton", "torch"], ops=["triton", "cpp"]), nothing)
    assert {(row["kind"], row["impl"]) for row in rows} == {
        ("stage", "triton"), ("stage", "torch"), ("op", "triton"), ("op", "cpp"),
    }  # fmt: skip
    assert all(row["time_s"] and row["disagrees"] is None and row["failed"] is None for row in rows)


@pytest.mark.thorough
def test_a_stage_that_fails_leaves_the_others(monkeypatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("does not compile")

    monkeypatch.setattr(FusedMlpIn, "forward", broken)
    rows = _gpu_stages.measure(small_stage("mlp_in"), nothing)
    failed = {(row["kind"], row["impl"]): row["failed"] for row in rows}
    assert failed == {
        ("stage", "cpp"): "RuntimeError: does not compile",
        ("stage", "torch"): None,
        ("op", "cpp"): "RuntimeError: does not compile",
    }


def test_what_auto_should_take_follows_from_the_figures() -> None:
    def step(impl: str, seconds: float | None, n: int = 1024, **more: Any) -> dict[str, Any]:
        times = None if seconds is None else {"median": seconds}
        return {
            "n": n,
            "L": 2,
            "precision": "bf16",
            "impl": impl,
            "graph": False,
            "step_s": times,
            "disagrees": None,
        } | more

    def op(name: str, impl: str, seconds: float, **more: Any) -> dict[str, Any]:
        shape = {"kind": "op", "stage": "s", "precision": "bf16", "rows": 9, "D": 8, "disagrees": None}
        return shape | {"name": name, "impl": impl, "time_s": {"median": seconds}} | more

    def best(steps: list[dict[str, Any]], ops: list[dict[str, Any]]) -> str | None:
        _gpu_stages.add_shares(ops, RATES, COPY)
        return _gpu_tables.best_auto(steps, ops)

    ops = [op("a", "cuda", 1.0), op("a", "triton", 0.9), op("b", "cuda", 1.0), op("b", "triton", 0.97)]
    ops += [op("a", "cuda", 1.0, stage="t"), op("a", "triton", 0.5, stage="t"), op("c", "cuda", 1.0)]
    ops += [op("c", "triton", 0.1, disagrees="it is wrong")]
    steps = [step("auto", 1.0), step("cuda", 1.1), step("triton", 1.2), step("reference", 0.1)]
    assert best(steps, ops) == "cuda+triton,a=triton"
    assert best([step("auto", 1.0), step("triton", 0.9)], ops) == "triton"
    assert (
        best([step("auto", 1.0), step("triton", 0.9)], [op("a", "cuda", 0.5), op("a", "triton", 0.9)])
        == "triton,a=cuda"
    )
    assert best([*steps, step("triton", 0.5, n=4096), step("auto", 0.6, n=4096)], []) == "triton"
    assert best([*steps, step("triton", 0.5, n=4096), step("auto", None, n=4096)], []) == "cuda+triton"
    assert best([step("auto", 1.0), step("torch", 0.9)], ops) == "torch"
    assert best([step("auto", 1.0), step("triton", 0.9, disagrees="it is wrong")], ops) is None
    assert best([step("auto", 1.0), step("triton", 0.9, graph=True)], ops) is None
