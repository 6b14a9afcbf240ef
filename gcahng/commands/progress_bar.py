"""A progress bar on standard error, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gcahng.extras import require


@contextmanager
def progress(what: str, *, unit: str = "count") -> Iterator[Callable[[int, int], None]]:
    """Gives a function that takes what is done and all there is to do, and draws it; silent without a terminal.

    Args:
        what: written before the bar.
        unit: "count", or "bytes".
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    require("rich", extra="train", purpose="the progress bar")
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), amount)
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
