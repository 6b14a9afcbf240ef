"""The page of a study: means with intervals, comparisons with the baselines, and every run. One file, as a report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

from gcahng.report.charts import figure, number, ticks
from gcahng.report.page import html_page
from gcahng.runs.metrics_table import metric_title
from gcahng.study import negatives
from gcahng.study.plan import Study
from gcahng.study.results import Comparison, Results, Row, command
from gcahng.study.statistics import MOST_FLIPPED, Spread

_WIDTH, _RIGHT, _LINE, _BOTTOM = 380, 22, 20, 34
_LONGEST, _LETTER = 26, 6.8  # characters of a method's name in a chart, and the width of one


def page(study: Study, out: Path, results: Results) -> str:
    """The whole page as HTML."""
    parts = {
        "results": ("Results", _means(study, results)),
        "differences": ("Differences to the baselines", _differences(study, results)),
        "negatives": ("Generated negatives", _negatives(study, results)),
        "runs": ("Runs", _runs(study, out, results)),
    }
    counts = {"method": len(study.methods), "data set": len(study.data), "seed": len(study.seeds)}
    about = ", ".join(f"{count} {thing}{'s' * (count != 1)}" for thing, count in counts.items())
    return html_page("study", study.name, f"{escape(str(out))} · {about}", parts)


def interval_chart(
    rows: Sequence[tuple[str, Spread, Sequence[float]]], *, title: str, note: str, zero: bool = False
) -> str:
    """A figure with a line for each row: the mean, the 95 % interval as a bar, and the single values as points.

    Args:
        rows: the name, the spread and the values of each.
        title: the heading, as markup.
        note: a small text beside it.
        zero: whether 0 is marked.
    """
    numbers = [value for _, spread, values in rows for value in (spread.mean, *values)]
    numbers += [end for _, spread, _ in rows for end in (spread.low, spread.high) if end is not None]
    numbers += [0.0] if zero else []
    marks = ticks(min(numbers), max(numbers), 3)
    low, high = marks[0], marks[-1]
    height = _LINE * len(rows) + 10 + _BOTTOM
    names = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name, *_ in rows]
    left = 16 + _LETTER * max(map(len, names))

    def x(value: float) -> float:
        return left + (_WIDTH - left - _RIGHT) * (value - low) / (high - low)

    bottom = height - _BOTTOM
    grid = "".join(f"M{x(mark):.1f},6V{bottom}" for mark in marks)
    parts = [f'<path class="grid" d="{grid}"/>']
    parts += [f'<text x="{x(mark):.1f}" y="{bottom + 15}" text-anchor="middle">{number(mark)}</text>' for mark in marks]
    if zero:
        parts.append(f'<path class="line c6 dashed" d="M{x(0.0):.1f},6V{bottom}"/>')
    for place, (name, (_, spread, values)) in enumerate(zip(names, rows, strict=True)):
        y = 6 + _LINE * (place + 0.5)
        parts.append(f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        parts += [f'<circle class="dot c6" cx="{x(value):.1f}" cy="{y:.1f}" r="1.6"/>' for value in values]
        if spread.low is not None and spread.high is not None:
            parts.append(f'<path class="line c1" d="M{x(spread.low):.1f},{y:.1f}H{x(spread.high):.1f}"/>')
        parts.append(f'<circle class="dot c1" cx="{x(spread.mean):.1f}" cy="{y:.1f}" r="3.5"/>')
    label = escape(f"{title} {note}")
    picture = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return figure(title, note, picture)


def _values(study: Study, results: Results, row: Row) -> list[float]:
    return [
        100 * results.values[run.name][row.metric]
        for run in study.runs
        if (run.data, run.method) == (row.data, row.method) and run.name in results.values
    ]


def _percent(spread: Spread) -> Spread:
    scaled = [None if value is None else 100 * value for value in spread[1:]]
    return Spread(spread.count, *scaled)  # type: ignore[arg-type]


def _means(study: Study, results: Results) -> str:
    classes, checkpoint = study.evaluate, study.checkpoint
    chosen = "the best checkpoint by the validation classes" if checkpoint == "best" else "the last checkpoint"
    done = f"{len(results.values)} of {len(study.runs)} runs have finished."
    note = (
        f"Percent on the {classes} classes, of {chosen}. Mean ± sample standard deviation over seeds; bars are "
        f"95&nbsp;% intervals of the mean (Student's t), and small points are runs. {done}"
    )
    if classes == "validation" and checkpoint == "best":
        note += " The same validation classes chose the checkpoint, so these numbers are a little too good."
    parts = [f'<p class="note">{note}</p>']
    for data in study.data:
        rows = [row for row in results.rows if row.data == data]
        parts.append(f"<h3>{escape(data)}</h3>{_table_of_means(study, rows)}")
        done = [run.name for run in study.runs if run.data == data and run.name in results.summaries]
        if len({results.summaries[name]["data_digest"] for name in done}) > 1:
            parts.append(
                '<p class="note">The runs did not all see the same images: their data digests differ, so their numbers '
                "may not compare.</p>"
            )
        charts = []
        for metric in study.metrics:
            shown = [
                (row.method, _percent(row.spread), _values(study, results, row))
                for row in rows
                if row.metric == metric and row.spread is not None
            ]
            if shown:
                charts.append(interval_chart(shown, title=metric_title(metric), note=f"percent, {data}"))
        parts.append(f'<div class="charts">{"".join(charts)}</div>')
    return "".join(parts)


def _table_of_means(study: Study, rows: Sequence[Row]) -> str:
    cells = {(row.method, row.metric): row.spread for row in rows}
    top = {
        metric: max((spread.mean for (_, m), spread in cells.items() if m == metric and spread), default=None)
        for metric in study.metrics
    }
    lines = []
    for method in study.methods:
        line, count = "", 0
        for metric in study.metrics:
            spread = cells[method, metric]
            count = max(count, spread.count if spread else 0)
            best = ' class="top"' if spread is not None and spread.mean == top[metric] else ""
            line += f"<td{best}>{mean_and_std(spread)}</td>"
        lines.append(f"<tr><th>{_breakable(method)}</th>{line}<td>{count}</td></tr>")
    head = "".join(f"<th>{metric_title(metric)}</th>" for metric in study.metrics)
    return _table(f"<th>method</th>{head}<th>seeds</th>", lines)


def mean_and_std(spread: Spread | None) -> str:
    """ "mean ± std" in percent; the mean alone for one value; a dash without one."""
    if spread is None:
        return "–"
    return f"{100 * spread.mean:.2f}" + ("" if spread.std is None else f" ± {100 * spread.std:.2f}")


def _differences(study: Study, results: Results) -> str:
    if not any(method.baseline for method in study.methods.values()):
        return '<p class="empty">No method names a baseline.</p>'
    if not results.comparisons:
        return '<p class="empty">No method has finished with a seed that its baseline has finished with.</p>'
    note = (
        "Method minus baseline in points, seed by seed, with the 95&nbsp;% interval of the paired t test. p are two-"
        "sided: of the paired t test, and of the exact sign-flip test, which sums all ways to exchange the two values "
        f"of a seed (up to {MOST_FLIPPED} seeds) and cannot fall below 2<sup>1−n</sup> with n seeds. Holm's correction "
        "is over all comparisons of a metric on this page."
    )
    parts = [f'<p class="note">{note}</p>']
    for data in study.data:
        of_data = [one for one in results.comparisons if one.data == data]
        if not of_data:
            continue
        head = "<th>method</th><th>baseline</th><th>metric</th><th>seeds</th><th>difference</th><th>95 % interval</th>"
        head += "<th>p, t</th><th>Holm</th><th>p, sign flip</th><th>Holm</th>"
        parts.append(f"<h3>{escape(data)}</h3>{_table(head, [_comparison(one) for one in of_data])}")
        charts = []
        for metric in study.metrics:
            shown = [
                (one.method, _percent(one.paired.difference), _single(results, study, one))
                for one in of_data
                if one.metric == metric
            ]
            if shown:
                note = f"points against the baseline, {data}"
                charts.append(interval_chart(shown, title=metric_title(metric), note=note, zero=True))
        parts.append(f'<div class="charts">{"".join(charts)}</div>')
    return "".join(parts)


def _single(results: Results, study: Study, one: Comparison) -> list[float]:
    """The difference of each seed, in points."""
    of = {
        (run.method, run.seed): results.values[run.name][one.metric]
        for run in study.runs
        if run.data == one.data and run.name in results.values
    }
    return [100 * (of[one.method, seed] - of[one.baseline, seed]) for seed in one.seeds]


def _comparison(one: Comparison) -> str:
    difference = one.paired.difference
    interval = "–"
    if difference.low is not None and difference.high is not None:
        interval = f"{100 * difference.low:+.2f} to {100 * difference.high:+.2f}"
    p_values = (one.paired.p_t, one.holm_t, one.paired.p_sign_flip, one.holm_sign_flip)
    cells = [escape(one.baseline), metric_title(one.metric), str(len(one.seeds)), f"{100 * difference.mean:+.2f}"]
    cells += [interval, *("–" if p is None else f"{p:.2g}" for p in p_values)]
    return f"<tr><th>{_breakable(one.method)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _negatives(study: Study, results: Results) -> str:
    curves = {
        data: {
            method: [
                found
                for run in study.runs
                if (run.data, run.method) == (data, method) and (found := results.negatives.get(run.name))
            ]
            for method in study.methods
        }
        for data in study.data
    }
    return negatives.section(curves)


def _runs(study: Study, out: Path, results: Results) -> str:
    head = "<th>run</th>" + "".join(f"<th>{metric_title(metric)}</th>" for metric in study.metrics)
    lines = []
    for run in study.runs:
        values = results.values.get(run.name, {})
        cells = [f"{100 * values[m]:.2f}" if m in values else "–" for m in study.metrics]
        lines.append(f"<tr><th>{_breakable(run.name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    commands = "\n".join(shlex.join(command(out, run)) for run in study.runs)
    note = "The configuration of each run is in options/, and all numbers are in results.json and results.csv."
    return (
        f'<p class="note">{note}</p>{_table(head, lines)}'
        f"<details><summary>The command of each run</summary><pre>{escape(commands)}</pre></details>"
    )


def _breakable(name: str) -> str:
    """A name as markup that may go on in a new line behind an underscore."""
    return escape(name).replace("_", "_<wbr>")


def _table(head: str, lines: Sequence[str]) -> str:
    rows = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="numbers">{rows}</table></div>'
