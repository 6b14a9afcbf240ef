"""Numbers of a study, from summaries that stand for finished runs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from gcahng.errors import UserError
from gcahng.runs.records import HISTOGRAM, NEGATIVES
from gcahng.study import Study, read_study
from gcahng.study.negatives import mean_curve, section
from gcahng.study.page import interval_chart, page
from gcahng.study.results import as_csv, as_json, collect, run_folder
from gcahng.study.statistics import Spread, holm, paired

FILE = """
data: {a: {}, b: {data.train_classes: 20}}
methods: {base: {loss: npair}, better: {baseline: base}}
seeds: [0, 1, 2]
metrics: [map@r]
"""
VALUES = {  # by data set, method and seed
    ("a", "base"): [0.5, 0.6, 0.55],
    ("a", "better"): [0.6, 0.65, 0.66],
    ("b", "base"): [0.2, 0.3, 0.1],
    ("b", "better"): [0.1, 0.35, 0.2],
}


def finish(study: Study, out: Path, skip: str = "", digest: str = "x") -> None:
    for run in study.runs:
        value = VALUES[run.data, run.method][run.seed]
        tables = {"val": {"map@r": value + 0.01}, "test": {"map@r": value + 0.02}, "test_best": {"map@r": value + 0.03}}
        summary = {"steps": 9, "seconds": 1.0, "left_out": 0, "unreadable": 0, "loss": "l", "data_digest": digest}
        summary |= {"best": {"step": 5, "val": {"map@r": value}}, "step_seconds": 1, "step_cpu_seconds": 1, **tables}
        if run.name != skip:
            folder = run_folder(out, run)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").write_text(json.dumps(summary))


def make(path: Path, more: str = "") -> Study:
    path.write_text(FILE + more)
    return read_study(path)


@pytest.mark.parametrize(
    ("more", "added"),
    [
        ("", 0.0),
        ("checkpoint: last", 0.01),
        ("{evaluate: test, checkpoint: last}", 0.02),
        ("evaluate: test", 0.03),
    ],
)
def test_the_classes_and_the_checkpoint_that_were_asked_for(more: str, added: float, tmp_path: Path) -> None:
    study = make(tmp_path / "s.yaml", more.strip("{}").replace(", ", "\n"))
    finish(study, tmp_path)
    found = collect(study, tmp_path)
    for run in study.runs:
        wanted = VALUES[run.data, run.method][run.seed] + added
        assert found.values[run.name] == {"map@r": pytest.approx(wanted)}
    lines = [*csv.DictReader(as_csv(study, found).splitlines())]
    assert len(lines) == 12 and {line["classes"] for line in lines} == {study.evaluate}
    text = page(study, tmp_path, found)
    assert f"Percent on the {study.evaluate} classes" in text and "did not all see the same images" not in text


def test_pairs_and_holm_over_all_data_sets(tmp_path: Path) -> None:
    study = make(tmp_path / "s.yaml")
    finish(study, tmp_path)
    found = collect(study, tmp_path)
    tests = [paired(VALUES[data, "better"], VALUES[data, "base"]) for data in ("a", "b")]
    assert [one.paired for one in found.comparisons] == tests
    assert [one.holm_t for one in found.comparisons] == holm([one.p_t for one in tests])
    assert [one.holm_sign_flip for one in found.comparisons] == holm([one.p_sign_flip for one in tests])
    assert json.loads(json.dumps(as_json(study, tmp_path, found)))["means"][0]["spread"]["mean"] == pytest.approx(0.55)


def test_a_pair_counts_once_both_runs_have_finished(tmp_path: Path) -> None:
    study = make(tmp_path / "s.yaml")
    finish(study, tmp_path, skip="a-base-seed1")
    one = collect(study, tmp_path).comparisons[0]
    assert one.seeds == (0, 2)
    assert one.paired == paired([0.6, 0.66], [0.5, 0.55])


def test_negatives_over_training(tmp_path: Path) -> None:
    study = make(tmp_path / "s.yaml")
    finish(study, tmp_path)
    assert "No finished run generated negatives" in page(study, tmp_path, collect(study, tmp_path))
    for run in study.runs:
        if (run.data, run.method) == ("b", "better") and run.seed < 2:
            record = dict.fromkeys((*NEGATIVES, "apart"), 1.0) | {HISTOGRAM: [1.0], "real": 2.0, "kind": "negatives"}
            records = [
                record | {"step": 5, "synthetic": 1.0 + run.seed, "nearer": 0.25},
                record | {"step": 9, "synthetic": 0.5, "nearer": 0.5, "apart": 0.25 * (1 + run.seed)},
                *([record | {"step": 12}] if run.seed else []),  # a step of one seed alone
            ]
            path = run_folder(tmp_path, run) / "metrics.jsonl"
            path.write_text("".join(json.dumps(one) + "\n" for one in records))
    found = collect(study, tmp_path)
    of_run = found.negatives["b-better-seed1"]
    assert of_run["distance"] == [(5, 1.0), (9, 0.25), (12, 0.5)] and of_run["nearer"][1] == (9, 0.5)
    assert found.negatives["b-better-seed2"] == {} == found.negatives["a-better-seed0"]
    means = {
        name: mean_curve([found.negatives[f"b-better-seed{seed}"][name] for seed in (0, 1)])
        for name in ("distance", "nearer", "apart")
    }
    assert means["distance"] == [(5, 0.75), (9, 0.25)] and means["apart"] == [(5, 0.5), (9, 0.1875)]
    text = page(study, tmp_path, found)
    for title in ("Hardness", "Harder than real", "Diversity"):
        assert text.count(f"<b>{title}</b>") == 1
    stored = json.loads(json.dumps(as_json(study, tmp_path, found)))
    (run,) = [run for run in stored["runs"] if (run["data"], run["method"], run["seed"]) == ("b", "better", 1)]
    assert run["negatives"]["apart"] == [[5, 0.5], [9, 0.25], [12, 0.5]]


def test_many_methods_are_in_several_charts() -> None:
    run = {"distance": [(1, 0.5), (2, 0.25)]}
    text = section({"a": {f"method{place}": [run] for place in range(7)}})
    assert text.count("<b>Hardness</b>") == 2 and "Diversity" not in text
    assert all(f">method{place}</li>" in text for place in range(7))


def test_other_images_are_told(tmp_path: Path) -> None:
    study = make(tmp_path / "s.yaml")
    finish(study, tmp_path)
    for run in study.runs[:1]:
        path = run_folder(tmp_path, run) / "summary.json"
        path.write_text(path.read_text().replace('"x"', '"y"'))
    text = page(study, tmp_path, collect(study, tmp_path))
    assert text.count("did not all see the same images") == 1


def test_a_metric_that_was_not_measured(tmp_path: Path) -> None:
    study = make(tmp_path / "s.yaml")
    finish(study, tmp_path)
    path = run_folder(tmp_path, study.runs[0]) / "summary.json"
    path.write_text(path.read_text().replace('"val": {"map@r": 0.5}', '"val": {}'))
    with pytest.raises(UserError, match="data.a: a-base-seed0 has no map@r of the best checkpoint on validation"):
        collect(study, tmp_path)


def test_long_names_stay_apart_in_a_chart() -> None:
    """Whole where a study's names differ at their end, and with room for every letter to the left of the line."""
    names = ["gca-supcon-no_messages-one", "gca-supcon-no_messages-two"]
    spread = Spread(1, 0.5, None, None, None)
    text = interval_chart([(name, spread, [0.5]) for name in names], title="MAP@R", note="")
    ends = [float(x) for name in names for x in re.findall(rf'<text x="([\d.]+)"[^>]*>{name}</text>', text)]
    assert len(ends) == 2 and min(ends) > 6.5 * len(names[0])
