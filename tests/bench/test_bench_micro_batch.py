"""benchmarks/bench_micro_batch.py: it shows only parts that compute what the whole batch computes."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from gcahng.errors import UserError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_micro_batch.py"
spec = importlib.util.spec_from_file_location("bench_micro_batch", SCRIPT)
bench_micro_batch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_micro_batch)

OPTIONS = argparse.Namespace(name="x", size=8, batch=4)


def measured(embedding: float, gradient: float) -> dict:
    return {
        "embeddings": torch.tensor([1.0, embedding]),
        "gradients": torch.tensor([2.0, gradient]),
        "times": [1.0, 3.0, 2.0],
        "peak_mib": 7.0,
    }


def test_a_row_is_of_the_median() -> None:
    row = bench_micro_batch.row(OPTIONS, 2, measured(0.5, 1.0), measured(0.5, 1.0))
    assert bench_micro_batch.text(row) == "| x | 4 | 2 | 2.00 | 7 | 0e+00 |"


@pytest.mark.parametrize("wrong", [(0.51, 1.0), (0.5, 1.01), (float("nan"), 1.0), (0.5, float("nan"))])
def test_parts_that_compute_something_else_have_no_row(wrong: tuple[float, float]) -> None:
    with pytest.raises(
        UserError, match="the results of micro_batch 2 are off by .*; they must be within 1e-03 of the whole"
    ):
        bench_micro_batch.row(OPTIONS, 2, measured(*wrong), measured(0.5, 1.0))


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # whose processes load it by its name
    import bench_micro_batch as by_name

    arguments = ["--name", "timm:test_vit", "--size", "160", "--batch", "5", "--micro_batch", "2", "--reps", "1"]
    assert by_name.main([*arguments, "--json", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["micro_batch"] for row in rows] == [None, 2]
