"""A run's report, from its folder to a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gcahng.extras import require
from gcahng.files import write_text, writing
from gcahng.paths import check_source, check_target
from gcahng.progress import Progress, no_progress
from gcahng.report.contents import gather
from gcahng.report.options import ReportOptions
from gcahng.report.page import page


def write_report(
    run: Path | str,
    out: Path | str | None = None,
    *,
    options: ReportOptions | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = no_progress,
    **changes: Any,
) -> Path:
    """Write one HTML page about a run, with everything in it; the same as `gcahng report`.

    Args:
        run: a run folder, a checkpoint or a model file; only a folder has curves.
        out: the page, which is replaced as a whole or not at all; None: report.html in the run folder, or beside the
            file.
        options: what the page shows; None: the defaults of `ReportOptions`.
        say: called with a line about each thing that is done.
        progress: called with the images embedded so far and all of them.
        changes: fields of `ReportOptions` that replace those of `options`.

    Returns:
        The page's path.

    Raises:
        UserError: an argument is out of range; the run, its data or an extra is missing; the page cannot be written.
    """
    require("PIL", "yaml", extra="train", purpose="gcahng report")
    options = replace(options or ReportOptions(), **changes)
    options.check()
    check_source("run", run)
    run = Path(run)
    out = Path(out or (run / "report.html" if run.is_dir() else run.with_suffix(".report.html")))
    check_target("out", out)
    contents = gather(run, options, say, progress)
    with writing(out):
        write_text(out, page(contents))
    return out
