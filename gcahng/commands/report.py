"""gcahng report"""

from __future__ import annotations

import sys

from gcahng.commands.arguments import Parser, SourcePath, TargetPath


def run(arguments: list[str]) -> int:
    """Write one HTML page about a run: curves, results against baselines, retrieved images, confused classes, a map.

    The page needs no network and no other file.
    """
    parser = Parser(prog="gcahng report", description=run.__doc__)
    parser.add_argument(
        "run", action=SourcePath, metavar="RUN", help="a run folder, or a checkpoint, whose page has no curves"
    )
    parser.add_argument(
        "--baseline", action=SourcePath, nargs="+", default=[], metavar="RUN", help="runs to compare with"
    )
    parser.add_argument(
        "--out", action=TargetPath, metavar="FILE.html", help="the page (report.html in the run folder)"
    )
    parser.add_argument("--which", choices=("last", "best"), default="last", help="checkpoint of run folders (last)")
    parser.add_number(
        "--queries", "how many of the best, of the worst and of random queries to show (6)", default=6, metavar="N"
    )
    parser.add_argument(
        "--map",
        choices=("auto", "umap", "pca"),
        default="auto",
        help="auto is UMAP where it is installed, and PCA elsewhere (auto)",
    )
    parser.add_number(
        "--seed", "seed of the random queries and of the map (0)", key="report seed", default=0, metavar="N"
    )
    parser.add_device()
    parser.add_argument(
        "--data.root", dest="data_root", action=SourcePath, metavar="DIR", help="folder of the images (the run's)"
    )
    options = parser.parse_args(arguments)

    from gcahng.extras import require

    require("rich", extra="train", purpose="gcahng report")
    from rich.progress import Progress

    from gcahng.report import write_report

    with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("embedding", total=None)
        written = write_report(
            options.run,
            options.out,
            baselines=options.baseline,
            which=options.which,
            queries=options.queries,
            map_method=options.map,
            seed=options.seed,
            device=options.device,
            data_root=options.data_root,
            say=lambda text: print(text, flush=True),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"written {written}, {written.stat().st_size / 1e6:.1f} MB")
    return 0
