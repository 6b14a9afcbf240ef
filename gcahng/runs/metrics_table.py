"""Retrieval metrics as people read them: their titles, and a table in percent."""

from __future__ import annotations

from collections.abc import Mapping


def metrics_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A small table in percent.

    Args:
        rows: the metrics of each row, as fractions, by the row's title.

    Returns:
        A head and the rows, with one column for each metric.
    """
    counts = ("queries", "queries_without_match", "clusters")
    names = [name for name in next(iter(rows.values())) if name not in counts]
    width = max(len(row) for row in rows)
    head = " " * width + "".join(f"{metric_title(name):>13}" for name in names)
    lines = [
        f"{row:<{width}}" + "".join(f"{100 * values[name]:13.2f}" for name in names) for row, values in rows.items()
    ]
    return "\n".join([head, *lines])


def metric_title(name: str) -> str:
    """A metric's name as people write it, such as Recall@1, MAP@R and R-Precision."""
    if name == "r_precision":
        return "R-Precision"
    return name.capitalize() if name.startswith(("recall", "precision")) else name.upper()
