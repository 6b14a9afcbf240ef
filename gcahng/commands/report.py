"""gcahng report"""

from __future__ import annotations

from pathlib import Path

from gcahng.commands._arguments import Parser


def run(arguments: list[str]) -> int:
    """Write one HTML page about a run: curves, results against baselines, retrieved images, confused classes, a map.

    The page needs no network and no other file.
    """
    parser = Parser(prog="gcahng report", description=run.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder (or a checkpoint, without curves)")
    parser.add_argument("--baseline", type=Path, nargs="+", default=[], metavar="RUN", help="runs to compare with")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="the page (report.html in the run folder)")
    parser.add_argument("--which", choices=("last", "best"), default="last", help="checkpoint of run folders (last)")
    parser.add_argument("--queries", type=int, default=6, metavar="N", help="best, worst and random ones, each (6)")
    parser.add_argument(
        "--map", choices=("auto", "umap", "pca"), default="auto", help="UMAP if installed, or PCA (auto)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random queries and the map (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    options = parser.parse_args(arguments)

    from gcahng.report import write_report

    written = write_report(
        options.run,
        options.out,
        baselines=options.baseline,
        which=options.which,
        queries=options.queries,
        map_method=options.map,
        seed=options.seed,
        device=options.device,
        say=lambda text: print(text, flush=True),
    )
    print(f"written {written}, {written.stat().st_size / 1e6:.1f} MB")
    return 0
