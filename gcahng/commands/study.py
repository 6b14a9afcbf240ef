"""gcahng study"""

from __future__ import annotations

import shlex
from pathlib import Path

from gcahng.commands.arguments import Parser, SourcePath


def run(arguments: list[str]) -> int:
    """Train a grid of methods, data sets and seeds, and compare the methods by paired tests.

    Each run is a run folder of `gcahng train`. The same command continues a study that was stopped or killed.
    """
    parser = Parser(prog="gcahng study", description=run.__doc__)
    parser.add_argument("file", action=SourcePath, metavar="FILE.yaml", help="what to train and to compare")
    parser.add_argument(
        "--out", action=SourcePath, metavar="DIR", help="folder of the runs and the results (runs/study-FILE)"
    )
    parser.add_number("--jobs", "runs at a time (one for each processor)", metavar="N")
    parser.add_argument("--dry-run", action="store_true", help="print what is done, what is left and the commands")
    options = parser.parse_args(arguments)

    from gcahng.commands.progress_bar import progress_bar
    from gcahng.extras import require

    require("yaml", "scipy", extra="train", purpose="gcahng study")
    from gcahng.study import finish_study, read_study

    study = read_study(options.file)
    out = options.out or Path("runs") / f"study-{study.name}"
    if options.dry_run:
        from gcahng.study.results import command
        from gcahng.study.runs import state

        states = [state(out, one) for one in study.runs]
        for one, found in zip(study.runs, states, strict=True):
            print(f"{found:<6} {shlex.join(command(out, one))}")
        print(f"{len(states) - states.count('done')} of {len(states)} runs left")
        return 0
    with progress_bar("runs") as progress:
        failed = finish_study(
            study, out, jobs=options.jobs, say=lambda text: print(text, flush=True), progress=progress
        )
    print(f"{failed} failed; written {out / 'study.html'}, results.json and results.csv")
    return 1 if failed else 0
