"""Retrieval metrics as people read them: their titles, and a table in percent."""

from __future__ import annotations

from collections.abc import Mapping


def metrics_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A small table in percent: a row each of `rows`, a column each metric."""
    counts = ("queries", "queries_without_match", "clusters")
    names = [name for name in next(iter(rows.values())) if name not in counts]
    width = max(len(row) for row in rows)
    head = " " * width + "".join(f"{metric_title(name):>13}" for name in names)
    lines = [
        f"{row:<{width}}" + "".join(f"{100 * values[name]:13.2f}" for name in names) for row, values in rows.items()
    ]
    return "\n".join([head, *lines])


def metric_title(name: str) -> str:
    """recall@1 → Recall@1, map@r → MAP@R, r_precision → R-Precision …"""
    if name == "r_precision":
        return "R-Precision"
    return name.capitalize() if name.startswith(("recall", "precision")) else name.upper()
