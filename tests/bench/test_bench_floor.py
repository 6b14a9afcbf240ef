"""benchmarks/bench_floor.py: a step takes at least as long as its products and stages, and the shares are right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from gcahng.bench.cases import Case

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_floor.py"
spec = importlib.util.spec_from_file_location("bench_floor", SCRIPT)
bench_floor = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_floor)


def test_shares() -> None:
    case = Case(12, dim=8, impl="cpp")
    flops = 2 * 112 * 8**2 * 12**2 / 2
    row = bench_floor.row(case, flops / 3, step=6.0, products=4.0, stages=1.0)
    shares = [row[name] for name in ("floor_s", "share", "share_of_products_and_stages", "share_of_products")]
    assert shares == pytest.approx([3.0, 3 / 6, 3 / 5, 3 / 4])
    assert bench_floor.text(row).endswith("| 3.000 | 6.000 | 4.000 | 1.000 | 50 % | 60 % | 75 % |")


def test_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "floor.json"
    assert bench_floor.main(["--batch", "12", "--dim", "32", "--layers", "1", "--reps", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == ["cpp fp32 store", "cpp bf16 store"]
    for row in rows:
        assert row["stages_s"] > 0 and row["products_s"] > 0 and row["products_s"] + row["stages_s"] < row["step_s"]


def test_other_stages_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Case, "implementation", "torch")
    assert bench_floor.main(["--batch", "12"]) == 2
    assert "bench_floor: the stages are torch; they must be cpp" in capsys.readouterr().err
