"""A run's report, from its folder to a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.files import check_folder, write_text
from gcahng.progress import Progress, no_progress
from gcahng.report.contents import gather
from gcahng.report.embedding_map import METHODS
from gcahng.report.page import page


def write_report(
    run: Path | str,
    out: Path | str | None = None,
    *,
    baselines: Sequence[Path | str] = (),
    which: str = "last",
    queries: int = 6,
    map_method: str = "auto",
    seed: int = 0,
    device: str = "auto",
    data_root: Path | str | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = no_progress,
) -> Path:
    """Write one HTML page about a run, with everything in it; the same as `gcahng report`.

    Args:
        run: a run folder, a checkpoint or a model file; only a folder has curves.
        out: the page; None: report.html in the run folder, or beside the file. Replaced as a whole or not at all.
        baselines: runs to compare with.
        which: checkpoint of run folders, "last" or "best".
        queries: rows in each of the grids of best, worst and random queries.
        map_method: "umap", "pca", or "auto": UMAP where it is installed.
        seed: of random queries and of the map.
        device: "auto", "cpu", "cuda" or "cuda:N".
        data_root: folder of the images, where it is not the one that the run had.
        say: hears what is being done.
        progress: hears how many images of how many are embedded.

    Returns:
        The page's path.

    Raises:
        UserError: an argument out of range, a missing run, data or extra, a page that cannot be written.
    """
    require("PIL", "yaml", extra="train", purpose="gcahng report")
    if queries < 1:
        raise UserError(f"queries is {queries}; it must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be in 0 … {2**32 - 1}")
    if map_method not in METHODS:
        raise UserError(f"map is {map_method!r}; it must be one of {', '.join(METHODS)}")
    run = Path(run)
    out = Path(out or (run / "report.html" if run.is_dir() else run.with_suffix(".report.html")))
    check_folder(out)
    if out.is_dir():
        raise UserError(f"out is {out}, a folder; name a file, such as {out / 'report.html'}")
    contents = gather(
        run,
        baselines=[Path(baseline) for baseline in baselines],
        which=which,
        queries=queries,
        map_method=map_method,
        seed=seed,
        device=device,
        data_root=None if data_root is None else Path(data_root),
        say=say,
        progress=progress,
    )
    try:
        write_text(out, page(contents))
    except OSError as error:
        raise UserError(f"out is {out}, which cannot be written: {error.strerror}") from None
    return out
