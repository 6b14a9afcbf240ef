"""Retrieval metrics as people read them: their titles, and a table in percent."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping


def metrics_table(rows: Mapping[str, Mapping[str, float]], width: int | None = None) -> str:
    """A small table in percent.

    Args:
        rows: the metrics of each row, as fractions, by the row's title.
        width: characters that a line may have; None: as many as it needs.

    Returns:
        A head and the rows, with one column for each metric. Where that is too wide, a block for each row: its title,
        and one line for each metric.
    """
    counts = ("queries", "queries_without_match", "clusters")
    names = [name for name in next(iter(rows.values())) if name not in counts]
    first = max(len(row) for row in rows)
    titles = [metric_title(name) for name in names]
    for least in (13, 0):  # columns of one width if possible
        columns = [max(least, len(title) + 2, 8) for title in titles]
        if width is None or first + sum(columns) <= width:
            break
    else:
        longest = max(map(len, titles))
        return "\n".join(
            line
            for row, values in rows.items()
            for line in (row, *(f"  {t:<{longest}}{100 * values[n]:8.2f}" for t, n in zip(titles, names, strict=True)))
        )
    head = " " * first + "".join(f"{title:>{column}}" for title, column in zip(titles, columns, strict=True))
    lines = [
        f"{row:<{first}}" + "".join(f"{100 * values[n]:{c}.2f}" for n, c in zip(names, columns, strict=True))
        for row, values in rows.items()
    ]
    return "\n".join([head, *lines])


def width_of_output() -> int | None:
    """The width of the terminal that standard output is; None where it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def metric_title(name: str) -> str:
    """A metric's name as people write it, such as Recall@1, MAP@R and R-Precision."""
    if name == "r_precision":
        return "R-Precision"
    return name.capitalize() if name.startswith(("recall", "precision")) else name.upper()
