"""benchmarks/gpu.py on the CPU: the whole command, its budget and its worker. It may not break unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import _gpu_items
import _gpu_step
import pytest
from _gpu_worker import Answer, Worker
from gpu_cases import empty, gpu

from gcahng.engine.schema import OPS


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
    assert out.count("(dry run on the CPU: the numbers mean nothing)") == 6
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


def test_what_does_not_fit_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    items = [
        _gpu_items.step(n, 1, "fp32", _gpu_items.Sides([]), dim=8) | {"guess": guess}
        for n, guess in ((12, 5), (15, 50), (18, 5))
    ]
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
        ("--dry", "--json", str(tmp_path)): f"--json is {tmp_path}, a folder; it must be a file",
        ("--dry", "--json", str(file / "x.json")): f"x.json; {file} is a file, not a folder",
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
    gpu.measure([_gpu_items.step(12, 1, "fp32", _gpu_items.Sides([]), dim=8)], worker, 1e6, found, lambda: None, clock)
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
    assert [item["section"] for item in items[:4]] == ["ceilings", "plan", "step", "products"]
    for item in steps:
        assert item["classes"] >= item["n"] // 3
    names = [case.name for case in _gpu_step.cases_of(steps[0] | {"impls": [], "without": ["reference tf32"]})]
    assert names == ["reference bf16", "reference fp32"]
    compiled = next(item for item in steps if item["compiled"])
    names = [case.name for case in _gpu_step.cases_of(compiled | {"impls": [], "without": []})]
    assert names[3:] == ["reference bf16 compiled", "reference tf32 compiled"]


def test_a_part_ends_with_its_share_and_the_rest_comes_last() -> None:
    def item(n: int, part: str) -> dict[str, Any]:
        return _gpu_items.step(n, 1, "fp32", _gpu_items.Sides([]), dim=8) | {"guess": 10, "part": part}

    items = [item(12, "choices"), item(15, "choices"), item(18, "choices"), item(21, "stages"), item(24, "rest")]
    clock, found = Clock(), empty()
    worker = Scripted(clock, 10.0)
    gpu.measure(items, worker, 70.0, found, lambda: None, clock)
    assert [x["n"] for x in worker.items] == [12, 15, 21, 24, 18] and not found["dropped"]
    clock, found = Clock(), empty()
    worker = Scripted(clock, 10.0)
    gpu.measure(items, worker, 45.0, found, lambda: None, clock)
    assert [x["n"] for x in worker.items] == [12, 21, 24, 15]
    assert found["dropped"] == ["step n = 18, L = 1, fp32"]


def test_every_choice_is_measured_within_its_part() -> None:
    impls = ["auto", "cuda", "triton", "torch"]
    made = _gpu_items.items(impls, ["cuda", "triton"], None, True)
    parts = list(_gpu_items.PARTS)
    assert [parts.index(item["part"]) for item in made] == sorted(parts.index(item["part"]) for item in made)
    first = [item for item in made if item["part"] == "choices"]
    whole = first[0]
    names = [case.name for case in _gpu_step.cases_of(whole | {"without": [], "device": "cuda"})]
    assert {"auto bf16 store", "cuda bf16 store", "triton bf16 store", "torch bf16 store"} < set(names)
    assert "auto bf16 store graph" in names and "auto bf16 store bfloat16 edges" in names
    assert {item["stage"] for item in first if item["section"] == "products"} == set(_gpu_items.PRODUCTS)
    assert any(item.get("compiled") for item in made if item["part"] == "reference")
    sizes = {
        item["n"] for item in made if item["section"] == "step" and (item["layers"], item["precision"]) == (2, "bf16")
    }
    assert {255, 1023, 4095} <= sizes
    assert all(sum(x["guess"] for x in made if x["part"] == part) < 480 for part in ("choices", "stages"))
