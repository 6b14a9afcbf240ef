"""A progress bar on standard error, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gcahng.extras import require
from gcahng.launch import launched
from gcahng.progress import Progress, no_progress


@contextmanager
def progress_bar(what: str, *, unit: str = "count") -> Iterator[Progress]:
    """Gives a `Progress` that draws a bar; it draws nothing where standard error is no terminal, and in all but the
    first of several processes.

    Args:
        what: the text before the bar.
        unit: what is counted, "count" or "bytes".
    """
    if launched().rank or not sys.stderr.isatty():
        yield no_progress
        return
    require("rich", extra="train", purpose="the progress bar")
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), amount)
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Bar(*columns, *times, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
