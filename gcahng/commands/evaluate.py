"""gcahng eval"""

from __future__ import annotations

import sys
from pathlib import Path

from gcahng.commands._arguments import Parser


def run(arguments: list[str]) -> int:
    """Print retrieval metrics of a trained network, and write them as JSON."""
    parser = Parser(prog="gcahng eval", description=run.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run folder or a checkpoint file")
    parser.add_argument("--which", choices=("last", "best"), default="last", help="checkpoint of a run folder (last)")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="its classes (test)")
    parser.add_argument("--recall_at", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K", help="(1 2 4 8)")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["recall", "map@r", "r_precision"],
        metavar="METRIC",
        help="any of recall, precision, map, map@r, r_precision (recall map@r r_precision)",
    )
    parser.add_argument("--precision_at", type=int, nargs="+", default=[1, 10], metavar="K", help="(1 10)")
    parser.add_argument("--map_at", type=int, nargs="+", default=[10], metavar="K", help="(10)")
    parser.add_argument("--ties", default="index", help="index, expected, optimistic or pessimistic (index)")
    parser.add_argument("--protocol", default="exact", help="exact, or official: as the authors evaluate (exact)")
    parser.add_argument("--per_class", action="store_true", help="also write the metrics of each class")
    parser.add_argument("--clustering", action="store_true", help="also NMI and AMI, which take longer")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write (eval-WHICH-SPLIT.json in the run)")
    options = parser.parse_args(arguments)

    from gcahng.train.evaluate import evaluate_checkpoint
    from gcahng.train.files import write_json
    from gcahng.train.report import metrics_table

    result = evaluate_checkpoint(
        options.run,
        which=options.which,
        split=options.split,
        recall_at=options.recall_at,
        device=options.device,
        clustering=options.clustering,
        metrics=options.metrics,
        precision_at=options.precision_at,
        map_at=options.map_at,
        ties=options.ties,
        protocol=options.protocol,
        per_class=options.per_class,
    )
    if not result["same_data"]:
        print(
            "gcahng: note: these images differ from those of the training run (another version of matplotlib?)",
            file=sys.stderr,
        )
    written = options.json or _default_json(options.run, options.which, options.split)
    write_json(written, result)
    print(metrics_table({f"{options.split} (per cent)": result[options.split]}))
    print(f"checkpoint  {result['checkpoint']}, step {result['steps']}")
    print(f"written     {written}")
    return 0


def _default_json(run: Path, which: str, split: str) -> Path:
    return run / f"eval-{which}-{split}.json" if run.is_dir() else run.with_suffix(f".eval-{split}.json")
