"""The numbers of a study: values of its finished runs, means over seeds, and comparisons with the baselines."""

from __future__ import annotations

import csv
import io
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from gcahng.config import config_to_dict
from gcahng.errors import UserError
from gcahng.runs.summary import read_summary
from gcahng.runs.versions import versions
from gcahng.study.negatives import Curve, curves_of_run
from gcahng.study.plan import Run, Study
from gcahng.study.statistics import Paired, Spread, holm, paired, spread


class Row(NamedTuple):
    """The mean of a method.

    Attributes:
        data: the data set.
        method: the method.
        metric: the metric.
        spread: over the seeds whose runs have finished; None: none has.
    """

    data: str
    method: str
    metric: str
    spread: Spread | None


class Comparison(NamedTuple):
    """A method against its baseline.

    Attributes:
        data: the data set.
        method: the method.
        baseline: what it is compared with.
        metric: the metric.
        seeds: with which both runs have finished.
        paired: the tests.
        holm_t: p of the t test after Holm's correction over all comparisons of this metric in the study.
        holm_sign_flip: the same for the sign-flip test.
    """

    data: str
    method: str
    baseline: str
    metric: str
    seeds: tuple[int, ...]
    paired: Paired
    holm_t: float | None
    holm_sign_flip: float | None


class Results(NamedTuple):
    """What a study found so far.

    Attributes:
        summaries: the summary of each finished run, by the run's name.
        values: the metrics of each finished run, by the run's name, as fractions.
        rows: the means.
        comparisons: with the baselines.
        negatives: how hard and diverse the generated negatives of each finished run were, by the run's name.
    """

    summaries: dict[str, dict[str, Any]]
    values: dict[str, dict[str, float]]
    rows: list[Row]
    comparisons: list[Comparison]
    negatives: dict[str, dict[str, Curve]]


def run_folder(out: Path, run: Run) -> Path:
    """Where a run of a study is."""
    return out / "runs" / run.name


def options_file(out: Path, run: Run) -> Path:
    """Where the configuration of a run is, which the study wrote before it began."""
    return out / "options" / f"{run.name}.yaml"


def command(out: Path, run: Run) -> list[str]:
    """The command that makes a run."""
    return ["gcahng", "train", "--config", str(options_file(out, run)), "--out", str(run_folder(out, run))]


def measured(study: Study, summary: dict[str, Any], run: Run) -> dict[str, float]:
    """The metrics of a finished run that the study compares.

    Raises:
        UserError: the run has not measured them.
    """
    best = study.checkpoint == "best"
    if study.evaluate == "test":
        found = summary["test_best" if best else "test"]
    else:
        found = summary["best"].get("val") if best else summary.get("val")
    missing = [metric for metric in study.metrics if metric not in (found or {})]
    if missing:
        raise UserError(
            f"data.{run.data}: {run.name} has no {missing[0]} of the {study.checkpoint} checkpoint on {study.evaluate} "
            "classes; there must be validation classes, or evaluate must be test and checkpoint last"
        )
    return {metric: float(found[metric]) for metric in study.metrics}


def collect(study: Study, out: Path) -> Results:
    """The numbers of the runs that have finished.

    Raises:
        UserError: a summary is damaged, or lacks a metric.
    """
    summaries, values, negatives = {}, {}, {}
    for run in study.runs:
        if (summary := read_summary(run_folder(out, run))) is not None:
            negatives[run.name] = curves_of_run(run_folder(out, run))
            summaries[run.name] = summary
            values[run.name] = measured(study, summary, run)
    names = {(run.data, run.method, run.seed): run.name for run in study.runs}
    rows, comparisons = [], []
    for metric in study.metrics:
        found = []
        for data in study.data:
            by_method = {
                method: {
                    seed: values[name][metric] for seed in study.seeds if (name := names[data, method, seed]) in values
                }
                for method in study.methods
            }
            for method, of_seed in by_method.items():
                rows.append(Row(data, method, metric, spread(list(of_seed.values())) if of_seed else None))
                baseline = study.methods[method].baseline
                both = [] if baseline is None else [seed for seed in of_seed if seed in by_method[baseline]]
                if baseline is not None and both:
                    tests = paired([of_seed[s] for s in both], [by_method[baseline][s] for s in both])
                    found.append(Comparison(data, method, baseline, metric, tuple(both), tests, None, None))
        corrected_t = holm([one.paired.p_t for one in found])
        corrected_flip = holm([one.paired.p_sign_flip for one in found])
        comparisons += [
            one._replace(holm_t=t, holm_sign_flip=flip)
            for one, t, flip in zip(found, corrected_t, corrected_flip, strict=True)
        ]
    return Results(summaries, values, rows, comparisons, negatives)


def as_json(study: Study, out: Path, results: Results) -> dict[str, Any]:
    """Everything as nested dicts and lists: runs with command, configuration and summary, means, and comparisons."""
    return {
        "study": study.name,
        "evaluate": study.evaluate,
        "checkpoint": study.checkpoint,
        "metrics": list(study.metrics),
        "versions": versions(),
        "runs": [
            {
                "data": run.data,
                "method": run.method,
                "seed": run.seed,
                "command": shlex.join(command(out, run)),
                "config": config_to_dict(run.config),
                "values": results.values.get(run.name),
                "negatives": results.negatives.get(run.name),
                "seconds": (results.summaries.get(run.name) or {}).get("step_seconds"),
                "cpu_seconds": (results.summaries.get(run.name) or {}).get("step_cpu_seconds"),
            }
            for run in study.runs
        ],
        "means": [
            {
                **row._asdict(),
                "spread": None if row.spread is None else row.spread._asdict(),
            }
            for row in results.rows
        ],
        "comparisons": [
            {
                **one._asdict(),
                "seeds": list(one.seeds),
                "paired": {**one.paired._asdict(), "difference": one.paired.difference._asdict()},
            }
            for one in results.comparisons
        ],
    }


def as_csv(study: Study, results: Results) -> str:
    """One line for each finished run and metric."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["data", "method", "seed", "metric", "classes", "checkpoint", "value"])
    for run in study.runs:
        for metric, value in results.values.get(run.name, {}).items():
            table.writerow([run.data, run.method, run.seed, metric, study.evaluate, study.checkpoint, repr(value)])
    return text.getvalue()
