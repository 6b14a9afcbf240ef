"""How hard and how diverse the generated negatives of a study's methods were over training."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from gcahng.report.charts import Line, line_chart
from gcahng.runs.log import METRICS
from gcahng.runs.records import read_records, series

COLORS = 6  # of a chart's lines


class Measure(NamedTuple):
    """A number about the negatives of a batch.

    Attributes:
        title: of its chart.
        note: what it is.
        value: the name of the record's value (gcahng.evaluation.hardness).
        over: the value that it is divided by; None: it is a share by itself.
    """

    title: str
    note: str
    value: str
    over: str | None


MEASURES = {
    "distance": Measure("Hardness", "distance to the anchor, percent of real negatives'", "synthetic", "real"),
    "nearer": Measure("Harder than real", "percent nearer than every real sample of their class", "nearer", None),
    "apart": Measure("Diversity", "distance between an anchor's, percent of real negatives'", "apart", "real"),
}
"""What is shown of each method, by its name in results.json."""

Curve = list[tuple[int, float]]


def curves_of_run(folder: Path) -> dict[str, Curve]:
    """The measures of a run at each evaluation, (step, fraction) by ascending step; {} if it generated no negatives.

    Args:
        folder: of the run.

    Raises:
        UserError: its metrics.jsonl is damaged.
    """
    path = folder / METRICS
    if not path.exists():
        return {}
    records = read_records(path)
    found = {}
    for name, measure in MEASURES.items():
        curve = series(records, "negatives", measure.value)
        if measure.over is not None:
            over = dict(series(records, "negatives", measure.over))
            curve = [(step, value / over[step]) for step, value in curve if over[step] > 0]
        if curve:
            found[name] = curve
    return found


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds, at the steps that all of them have."""
    of_step = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(one) for one in of_step)))
    return [(step, sum(one[step] for one in of_step) / len(of_step)) for step in steps]


def section(curves: dict[str, dict[str, list[dict[str, Curve]]]]) -> str:
    """The section of the study's page, as markup.

    Args:
        curves: by data set and method, the curves of each finished run.
    """
    parts = []
    for data, of_method in curves.items():
        charts = [chart for name in MEASURES for chart in _charts(data, name, of_method)]
        if charts:
            parts.append(f'<h3>{escape(data)}</h3><div class="charts">{"".join(charts)}</div>')
    if not parts:
        return '<p class="empty">No finished run generated negatives.</p>'
    about = (
        "Measured at each evaluation on a fixed batch of training images, mean over seeds. 100&nbsp;% is the mean "
        "distance of real negatives to the anchor. A hard negative lies near its anchor. Diverse negatives of one "
        "anchor lie far from each other."
    )
    return f'<p class="note">{about}</p>{"".join(parts)}'


def _charts(data: str, name: str, of_method: dict[str, list[dict[str, Curve]]]) -> list[str]:
    """Charts of a measure, each of as many methods as there are colors."""
    means = {}
    for method, runs in of_method.items():
        found = [run[name] for run in runs if name in run]
        if found and (curve := mean_curve(found)):
            means[method] = curve
    methods, measure = list(means), MEASURES[name]
    charts = []
    for start in range(0, len(methods), COLORS):
        lines = [
            Line(method, [(step, 100 * value) for step, value in means[method]], color, dots=True)
            for color, method in enumerate(methods[start : start + COLORS], start=1)
        ]
        charts.append(line_chart(lines, title=measure.title, note=f"{measure.note}, {data}", from_zero=True))
    return charts
