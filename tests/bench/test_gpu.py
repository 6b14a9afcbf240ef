"""benchmarks/gpu.py on the CPU, and what tests/gpu checks, on the CPU as well: neither may break unseen."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gcahng.bench.agreement import Agreement
from gcahng.bench.cases import Case, Problem
from gcahng.bench.peak import from_json, to_json
from gcahng.engine.schema import OPS
from gcahng.engine.stages.mlp_in import FusedMlpIn
from gcahng.engine.stages.norm_gelu import FusedNormGelu
from gcahng.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "benchmarks", ROOT / "tests" / "gpu", ROOT / "tests" / "engine", ROOT / "tests" / "golden"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import _gpu_errors  # noqa: E402
import _gpu_items  # noqa: E402
import _gpu_stages  # noqa: E402
import _gpu_step  # noqa: E402
import _gpu_tables  # noqa: E402
import on_device  # noqa: E402
import sanitized  # noqa: E402
from _gpu_worker import Answer, Worker  # noqa: E402
from engine_cases import Case as EngineCase  # noqa: E402

spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)

RATES, COPY = {"fp32": 1e12, "bf16": 2e12}, 1e12


def nothing(_: str) -> None:
    """Stands for the report of what is being worked on."""


def small_step(**changes: Any) -> dict[str, Any]:
    item = _gpu_items.step(12, 1, "fp32", ["cpp", "torch"], dim=8, device="cpu")
    return item | {"seconds": 0.01, "without": []} | changes


def small_stage(stage: str, **changes: Any) -> dict[str, Any]:
    item = _gpu_items.stages(stage, "fp32", ["cpp", "torch"], ["cpp"], dim=8, classes=3, device="cpu")
    return item | {"seconds": 0.01, "without": []} | changes


def steps_of(item: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = _gpu_step.measure(item, nothing)
    _gpu_step.add_ratios(rows, RATES)
    return {row["case"]: row for row in rows}


# -- the whole command


@pytest.mark.thorough
def test_a_dry_run_goes_through_everything(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # it takes minutes for what compiled kernels do at once
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "new" / "gpu.json"
    assert gpu.main(["--dry", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["dry"] is True and found["dropped"] == found["failed"] == []
    assert out.startswith("Dry run on the CPU in tiny sizes (as asked)")
    assert out.count("(dry run on the CPU: the numbers mean nothing)") == 5
    measured = {row["stage"] for row in found["stages"] if row["time_s"]}
    assert measured == set(_gpu_items.STAGES)
    ops = {row["name"] for row in found["stages"] if row["kind"] == "op"}

    assert ops == set(OPS), "every op is measured alone"
    steps = {(row["n"], row["L"], row["precision"]) for row in found["step"] if row["impl"] == "cpp"}
    assert steps == {(6, 1, "bf16"), (12, 2, "fp32")}
    assert all(row["disagrees"] is None and row["failed"] is None for row in found["step"] + found["stages"])
    assert all(row["ratios"] for row in found["step"] if row["impl"] != "reference")
    assert all(row["share"] > 0 for row in found["stages"] if row["kind"] == "op")
    assert "threads" in found["settings"] and not list(tmp_path.glob("**/*.tmp"))
    assert gpu.main(["--show", str(path)]) == 0
    assert "## Whole steps (dry run" in capsys.readouterr().out


class Clock:
    """Time that passes as the worker says."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


class Scripted:
    """Stands for the worker: each item takes so many seconds and is answered as the script says."""

    def __init__(self, clock: Clock, seconds: float, answers: dict[int, Answer] | None = None) -> None:
        self.clock, self.seconds, self.answers = clock, seconds, answers or {}
        self.items: list[dict[str, Any]] = []

    def run(self, item: dict[str, Any], limit: float) -> Answer:
        self.items.append(item)
        self.clock.time += self.seconds
        return self.answers.get(len(self.items), Answer([]))


def empty() -> dict[str, Any]:
    found = {"dry": True, "budget": 0.0, "settings": {}, "dropped": [], "failed": []}
    return found | {section: [] for section in gpu.SECTIONS}


def test_what_does_not_fit_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    items = [_gpu_items.step(n, 1, "fp32", [], dim=8) | {"guess": guess} for n, guess in ((12, 5), (15, 50), (18, 5))]
    clock, found, saved = Clock(), empty(), []
    worker = Scripted(clock, 10.0)
    gpu.measure(items, worker, 25.0, found, lambda: saved.append(json.loads(json.dumps(found))), clock)
    assert [item["n"] for item in worker.items] == [12, 18]
    assert found["dropped"] == ["step n = 15, L = 1, fp32"]
    assert len(saved) == 3
    assert "Dropped for want of time: step n = 15" in gpu.report(found)
    clock.time = 24.0
    gpu.measure(items, worker, 25.0, found, lambda: None, clock)
    assert len(found["dropped"]) == 4 and len(worker.items) == 2, "nothing is begun when the time is over"


def test_a_budget_of_nothing_drops_everything(tmp_path: Path, capsys) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--dry", "--budget", "0", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert len(found["dropped"]) > 20 and not found["step"]
    assert "Dropped for want of time: ceilings; plan; step" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path: Path, capsys) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"rows": []}')
    mistakes = {
        ("--show", str(tmp_path / "none.json")): "none.json cannot be read: No such file or directory",
        ("--show", str(file)): "other.json is not a file that this command wrote",
        ("--dry", "--json", str(tmp_path)): f"--json {tmp_path} cannot be written: Is a directory",
        ("--dry", "--json", str(file / "x.json")): "x.json cannot be written: ",
        ("--dry", "--budget", "nan"): "--budget is nan; it must be seconds, at least 0",
        ("--dry", "--budget", "-1"): "--budget is -1.0; it must be seconds, at least 0",
    }
    for arguments, message in mistakes.items():
        with pytest.raises(SystemExit, match="2"):
            gpu.main(list(arguments))
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_item_goes_on_without_the_case_that_took_the_process_along() -> None:
    lost = Answer(None, "CUDA error: an illegal memory access", "triton fp32 store")
    clock, found = Clock(), empty()
    worker = Scripted(clock, 1.0, {1: lost, 2: Answer(None, "cut off", None)})
    gpu.measure([_gpu_items.step(12, 1, "fp32", [], dim=8)], worker, 1e6, found, lambda: None, clock)
    assert [item["without"] for item in worker.items] == [[], ["triton fp32 store"]]
    assert [row["case"] for row in found["failed"]] == ["triton fp32 store", None]
    assert gpu._went_wrong(found)
    assert "triton fp32 store: CUDA error: an illegal memory access" in gpu.report(found)


def test_stopping_keeps_what_there_is(tmp_path: Path, monkeypatch) -> None:
    class Stopped(Scripted):
        def run(self, item: dict[str, Any], limit: float) -> Answer:
            if self.items:
                raise KeyboardInterrupt
            return super().run(item, limit)

        def close(self) -> None:
            pass

    path = tmp_path / "gpu.json"
    row = {"kind": "copy", "failed": None, "rate": 2e12}
    worker = Stopped(Clock(), 0.0, {1: Answer([row])})
    assert gpu.main(["--dry", "--json", str(path)], make_worker=lambda: worker) == 130
    assert json.loads(path.read_text())["ceilings"] == [row | {"item": 0}]


@pytest.mark.slow
def test_a_check_that_is_cut_off_says_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "test_two.py"
    marked = "import time, pytest\npytestmark = pytest.mark.gpu\n"
    path.write_text(f"{marked}def test_one():\n    assert 1 == 2\ndef test_two():\n    time.sleep(60)\n")
    found = gpu._check(10, [str(path)])
    assert found["status"] == "cut off after 10 s" and found["seconds"] < 40
    assert "1 failed" in found["summary"]
    (line,) = found["failed"]
    assert line.startswith("FAILED") and "test_one" in line


@pytest.mark.thorough
def test_the_worker_answers_fails_and_is_cut_off(monkeypatch) -> None:
    worker = Worker()
    try:
        plan = {"section": "plan", "dim": 8, "views": 3, "layers": [1], "precisions": ["fp32"], "impls": ["torch"]}
        (row,) = worker.run(plan | {"device": "cpu"}, 60).rows
        assert row["largest"]["recompute"] >= row["largest"]["store"] > 0
        assert worker.run({"section": "nonsense"}, 60) == Answer(None, "KeyError: 'nonsense'", None)
        assert worker.run(plan | {"device": "cpu"}, 60).rows == [row], "the process lives on"
        worker._process.kill()
        worker._process.wait()
        assert "ended with status -9" in worker.run(plan | {"device": "cpu"}, 60).reason
        assert worker.run(plan | {"device": "cpu"}, 0.0).reason == "cut off after 0 s"
    finally:
        worker.close()


def test_the_wanted_items_of_a_gpu() -> None:
    items = _gpu_items.items(["auto", "cuda", "triton", "torch"], ["cuda", "triton"], None, True)
    steps = [item for item in items if item["section"] == "step"]
    pairs = {(item["n"], item["layers"], item["precision"]) for item in steps}
    for n in (81, 255, 513, 1023, 2049, 4095):
        assert {(n, layers, precision) for layers in (1, 2) for precision in ("bf16", "fp32")} <= pairs
    assert [item["section"] for item in items[:4]] == ["ceilings", "plan", "step", "stages"]
    for item in steps:
        assert item["classes"] >= item["n"] // 3
    names = [case.name for case in _gpu_step.cases_of(steps[0] | {"impls": [], "without": ["reference tf32"]})]
    assert names == ["reference bf16", "reference fp32"]
    compiled = next(item for item in steps if item["compiled"])
    names = [case.name for case in _gpu_step.cases_of(compiled | {"impls": [], "without": []})]
    assert names[3:] == ["reference bf16 compiled", "reference tf32 compiled"]


# -- steps


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


# -- cases for a device


def test_cases_for_a_device() -> None:
    case = Case(12, device="cuda", precision="tf32", impl="reference", compiled=True)
    assert case.rounding == 2**-11 and case.compute is torch.float32
    assert from_json(to_json(case)) == case
    with pytest.raises(UserError, match="precision is 'tf32'; it must be one of fp32, bf16, fp64"):
        Case(12, precision="tf32")
    with pytest.raises(UserError, match="compiled is True and impl is 'cpp'"):
        Case(12, impl="cpp", compiled=True)
    with pytest.raises(UserError, match="device is 'tpu'"):
        Case(12, device="tpu")


def test_products_are_what_the_precision_says() -> None:
    before = torch.get_float32_matmul_precision()
    for precision, wanted in (("tf32", "high"), ("fp32", "highest"), ("bf16", "highest")):
        with Problem.products(SimpleNamespace(case=Case(12, precision=precision, device="cuda"))):
            assert torch.get_float32_matmul_precision() == wanted
        assert torch.get_float32_matmul_precision() == before
    with Problem.products(SimpleNamespace(case=Case(12))):
        assert torch.get_float32_matmul_precision() == before


def test_a_compiled_reference_is_the_reference(monkeypatch) -> None:
    compiled = []

    def compile_(function: Any) -> Any:
        compiled.append(function.__name__)
        return partial(function)

    monkeypatch.setattr(torch, "compile", compile_)
    case = Case(12, 3, 16, 1, impl="reference", compiled=True)
    assert Agreement(case).problem(case) is None
    assert compiled == ["metric_pass", "generator_pass"]
    assert replace(case, compiled=False).name + " compiled" == case.name


# -- what tests/gpu checks


def test_steps_on_a_device() -> None:
    on_device.check_against_reference("cpu", EngineCase(classes=3, dim=8), "cpp")
    on_device.check_precisions("cpu", "cpp", ("fp32",), n=12, dim=8)
    on_device.check_step_twice("cpu", "cpp", "bf16", n=12, dim=8)
    on_device.check_replay("cpu", "cpp")


def test_the_authors_numbers_on_a_device() -> None:
    on_device.check_golden_generate("cpu", "c5_k3_d16_l1_h2", "cpp")
    on_device.check_golden_training("cpu", "c5_k3_d16_l1_h2", "cpp")


def test_what_the_sanitizer_runs(capsys) -> None:
    sanitized.main("nothing", device="cpu")
    sanitized.main("cpp", "bf16", "cpu")
    assert capsys.readouterr().out.split() == ["ready", "finished"]


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
