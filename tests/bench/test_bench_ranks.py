"""benchmarks/bench_ranks.py: it shows only processes that compute what one process computes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gcahng.bench.cases import Case
from gcahng.errors import UserError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_ranks.py"
spec = importlib.util.spec_from_file_location("bench_ranks", SCRIPT)
bench_ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_ranks)


def measured(loss: float, gradient: float) -> dict:
    return {"first": {"loss": loss}, "gradient": torch.tensor([[1.0, gradient]]), "times": [1.0, 3.0], "peak": 10}


def test_a_row_is_of_the_slowest_process() -> None:
    one, other = measured(2.0, 3.0), measured(2.0, 3.0) | {"times": [2.0, 2.0], "peak": 20}
    row = bench_ranks.row(Case(12, dim=8), 2, 1, [one, other], 0.0)
    assert row["all_s"] == [2.0, 3.0] and row["peaks"] == [10, 20]
    assert bench_ranks.text(row).startswith("| 12 | 2 | 1 | 2.500 |")


@pytest.mark.parametrize("wrong", [(2.1, 3.0), (2.0, 3.01)])
def test_processes_that_compute_something_else_have_no_row(wrong: tuple[float, float]) -> None:
    one = measured(2.0, 3.0) | {"gradient": torch.tensor([[1.0, 3.0], [1.0, 3.0]])}
    parts = [measured(2.0, 3.0), measured(2.0, 3.0)]
    assert bench_ranks.disagreement(parts, one) == 0
    off = bench_ranks.disagreement([parts[0], measured(*wrong)], one)
    with pytest.raises(UserError, match="2 processes at n = 12 differ from one by"):
        bench_ranks.row(Case(12, dim=8), 2, 1, parts, off)


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
        command = [sys.executable, str(SCRIPT), "--batch", "12", "--dim", "16", "--reps", "1", *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = run("--processes", "2", "--json", str(tmp_path / "ranks.json"))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "ranks.json").read_text())["rows"]
    assert (row["n"], row["processes"], len(row["peaks"])) == (12, 2, 2)
    done = run("--processes", "5")
    assert done.returncode == 2 and "--batch is 12; it must be a multiple of --processes 5" in done.stderr
