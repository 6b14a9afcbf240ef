"""What the charts and tables of the page are drawn from: every number where it belongs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gcahng.report import contents, sections
from gcahng.report.charts import Line, bar_chart
from gcahng.report.contents import Run
from gcahng.report.page import _comparison


def evaluation(step: int, kind: str, value: float) -> dict[str, Any]:
    return {"step": step, "kind": kind, "map@r": value, "recall@1": value + 0.25, "recall@4": value + 0.5}


def run(name: str, value: float, *records: dict[str, Any], **more: float) -> Run:
    metrics = {"recall@1": value, "recall@4": value + 0.25, "map@r": 1 - value, "queries": 7} | more
    return Run(name, "gca_hng", 10, metrics, list(records), None)


@pytest.fixture
def charts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each chart is given, by its title: lines by name, or the arguments of a histogram."""
    drawn: dict[str, Any] = {}

    def lines(given: list[Line], *, title: str, **_: Any) -> str:
        drawn[title] = {line.name: line for line in given}
        return ""

    def bars(*arguments: Any, title: str, key: tuple[str, str], **_: Any) -> str:
        drawn[title] = (*arguments, key)
        return ""

    monkeypatch.setattr(sections, "line_chart", lines)
    monkeypatch.setattr(sections, "bar_chart", bars)
    return drawn


def test_curves_of_a_run_beside_its_baselines(charts: dict[str, Any]) -> None:
    records = [evaluation(3, "val", 0.125), {"step": 4, "kind": "train", "loss": 2.5, "J_syn": 0.5}]
    mine = run("mine", 0.5, *records, evaluation(6, "val", 0.25), evaluation(6, "test", 0.0))
    other = run("other", 0.25, evaluation(5, "val", 0.375), evaluation(5, "test", 0.0))
    without = run("without", 0.25, evaluation(5, "test", 0.0))
    sections.curves(SimpleNamespace(run=mine, baselines=[other, without]))
    assert charts["MAP@R"]["mine"].points == [(3, 12.5), (6, 25.0)]
    assert charts["MAP@R"]["other"].points == [(5, 37.5)] and charts["MAP@R"].keys() == {"mine", "other"}
    assert charts["Recall@1"]["other"].points == [(5, 62.5)]
    assert not charts["MAP@R"]["mine"].dashed and charts["MAP@R"]["other"].dashed
    assert charts["Recall@K"]["Recall@4"].points == [(3, 62.5), (6, 75.0)]
    assert charts["Loss"][""].points == [(4, 2.5)] and charts["<i>J</i><sub>syn</sub>"][""].points == [(4, 0.5)]

    charts.clear()
    sections.curves(SimpleNamespace(run=run("mine", 0.5, evaluation(6, "test", 0.125)), baselines=[other]))
    assert charts["MAP@R"]["mine"].points == [(6, 12.5)] and charts["MAP@R"]["other"].points == [(5, 0.0)]


def test_recall_of_every_run(charts: dict[str, Any]) -> None:
    few = run("few", 0.5)
    del few.metrics["recall@4"]
    sections.recall_chart([run("mine", 0.25, **{"recall@16": 1.0}), run("other", 0.5), few])
    found = {name: line.points for name, line in charts["Recall@K"].items()}
    assert found == {
        "mine": [(0, 25.0), (1, 50.0), (2, 100.0)],
        "other": [(0, 50.0), (1, 75.0)],
        "few": [(0, 50.0)],
    }


def negatives(step: int, base: float) -> dict[str, Any]:
    names = ("real", "synthetic", "positive", "hardest_real", "hardest_synthetic")
    found = {name: base + place for place, name in enumerate(names)}
    found |= {f"{name}_{part}": found[name] + more for name in names for part, more in (("p10", -0.5), ("p90", 0.25))}
    found |= {"nearer": base / 16, "theta_mean": base / 4, "theta_std": 0.125, "theta_histogram": [base / 4, 0.5]}
    return {"step": step, "kind": "negatives", **found}


def test_generated_negatives(charts: dict[str, Any]) -> None:
    """Of two records of a step, as a resumed run leaves, the later counts."""
    sections.negatives(run("mine", 0.5, negatives(8, 2.0), negatives(4, 9.0), negatives(4, 1.0)))
    distances = charts["Distance to the anchor"]
    assert distances["real negatives"].points == [(4, 1.0), (8, 2.0)]
    assert distances["real negatives"].band == [(4, 0.5, 1.25), (8, 1.5, 2.25)]
    assert distances["synthetic negatives"].points == [(4, 2.0), (8, 3.0)]
    assert distances["positives"].points == [(4, 3.0), (8, 4.0)] and not distances["positives"].band
    assert charts["Hardest negative"]["real"].points == [(4, 4.0), (8, 5.0)]
    assert charts["Hardest negative"]["synthetic"].points == [(4, 5.0), (8, 6.0)]
    assert charts["Harder than real"][""].points == [(4, 6.25), (8, 12.5)]
    assert charts["Distribution of θ"] == ([0.5, 0.5], [0.25, 0.5], ("step 8", "step 4"))
    (theta,) = charts["θ over training"].values()
    assert theta.points == [(4, 0.25), (8, 0.5)] and theta.band == [(4, 0.125, 0.375), (8, 0.375, 0.625)]
    sections.negatives(run("mine", 0.5, negatives(8, 2.0)))
    assert charts["Distribution of θ"][1] is None and "Diversity" not in charts  # as in older runs
    sections.negatives(run("mine", 0.5, negatives(4, 1.0) | {"apart": 0.5}, negatives(8, 2.0) | {"apart": 0.75}))
    assert charts["Diversity"]["of one anchor, to each other"].points == [(4, 0.5), (8, 0.75)]


def test_an_outline_is_as_high_as_its_shares() -> None:
    shares = [0.125, 0.5, 0.375]
    markup = bar_chart(shares, shares, title="T", note="", x_label="x", key=("now", "then"))
    tops = [float(y) for y in re.findall(r'class="bar" x="[\d.]+" y="([\d.]+)"', markup)]
    outline = re.search(r'<path class="line c2" d="([^"]+)"', markup)
    assert outline is not None
    heights = [float(y) for y in re.findall(r",([\d.]+)", outline.group(1))]
    assert heights == [top for top in tops for _ in range(2)]


def test_the_best_of_a_column_is_bold() -> None:
    table = _comparison([run("mine", 0.25), run("other", 0.5)])
    cells = re.findall(r"<td( class=\"top\")?>([\d.–]+)</td>", table)
    assert [(bool(top), text) for top, text in cells] == [
        (False, "25.00"), (False, "50.00"), (True, "75.00"), (True, "50.00"), (True, "75.00"), (False, "50.00"),
    ]  # fmt: skip
    assert "top" not in _comparison([run("mine", 0.25)])


@pytest.mark.parametrize(
    ("which", "recall_at", "from_summary"), [("last", (1, 2), True), ("best", (1, 2), False), ("last", (1, 3), False)]
)
def test_a_summary_stands_for_the_checkpoint_it_is_of(
    which: str, recall_at: tuple[int, ...], from_summary: bool, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[Path, str]] = []
    model = SimpleNamespace(config=SimpleNamespace(loss_title="npair"), step=3, data_digest="d")

    def load(path: Path, which: str) -> Any:
        loaded.append((path, which))
        return model

    class Measure:
        data: Callable[[Any], None] = staticmethod(lambda model: None)

        def __call__(self, *_: Any) -> tuple[None, None, dict[str, float]]:
            return None, None, {"recall@1": 2.0}

    monkeypatch.setattr(contents, "load_model", load)
    found = contents._baseline("b", runs.baseline, which, recall_at, Measure())  # type: ignore[arg-type]
    assert (found.metrics["recall@1"] <= 1) == from_summary and found.records
    assert loaded == ([] if from_summary else [(runs.baseline, which)])
