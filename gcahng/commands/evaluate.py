"""gcahng eval"""

from __future__ import annotations

import argparse
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcahng.commands.arguments import Parser, SourcePath, TargetPath, data_options
from gcahng.commands.progress_bar import progress_bar
from gcahng.errors import UserError, UserNote
from gcahng.launch import launched
from gcahng.machine import keep_freed_memory

if TYPE_CHECKING:
    from gcahng.evaluation.evaluate import EvalOptions

# What --per_class is without a file.
_IN_JSON = Path()


def run(arguments: list[str]) -> int:
    """Print Recall@K, MAP@R and R-Precision of a trained network or of embeddings, and write them as JSON.

    If the data set has a gallery, the test images are searched in it.
    """
    parser = Parser(prog="gcahng eval", description=run.__doc__)
    parser.add_argument(
        "run",
        action=SourcePath,
        nargs="?",
        metavar="RUN_OR_CHECKPOINT",
        help="a run folder, a checkpoint or a .safetensors file",
    )
    parser.add_argument("--which", choices=("last", "best"), default="last", help="checkpoint of a run folder (last)")
    parser.add_argument(
        "--split", choices=("test", "val", "train"), default="test", help="split whose classes are used (test)"
    )
    parser.add_argument(
        "--onnx", action=SourcePath, metavar="FILE", help="evaluate a network that gcahng export wrote instead"
    )
    parser.add_argument("--embeddings", action=SourcePath, metavar="FILE", help="evaluate a file of embeddings instead")
    parser.add_argument(
        "--gallery",
        action=SourcePath,
        metavar="FILE",
        help="file of embeddings that those of --embeddings are searched in",
    )
    parser.add_device()
    parser.add_timeout()
    parser.add_argument(
        "--json", action=TargetPath, metavar="FILE", help="where to write (eval-WHICH-SPLIT.json in the run)"
    )
    _add_metric_options(parser)
    parser.add_data_options()
    options = parser.parse_args(arguments)
    keep_freed_memory()
    given = {"": options.run, "--onnx ": options.onnx, "--embeddings ": options.embeddings}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        parser.error("the following arguments are required: RUN_OR_CHECKPOINT")
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(f'{name}{value}' for name, value in given.items())} are given; give only one of them"
        )
    if options.onnx is not None:
        if options.onnx.suffix != ".onnx":
            raise UserError(f"--onnx is {options.onnx}; it must be a .onnx file that gcahng export wrote")
        options.run = options.onnx
    if options.embeddings is None:
        if options.gallery is not None:
            raise UserError(
                f"--gallery is {options.gallery}; it needs --embeddings, because a data set has its own gallery"
            )
        return _print_and_write(options, _evaluate_network(options), options.split, _default_json(options))
    if data_options(options):
        raise UserError(
            f"--embeddings supports no --data.{next(iter(data_options(options)))}, because it reads no data set"
        )
    return _print_and_write(
        options, _evaluate_file(options), "embeddings", options.embeddings.with_suffix(".eval.json")
    )


def _add_metric_options(parser: Parser) -> None:
    group = parser.add_argument_group("metrics")
    group.add_argument(
        "--metrics",
        nargs="+",
        default=["recall", "map@r", "r_precision"],
        metavar="METRIC",
        help="any of recall, precision, map, map@r, r_precision (recall map@r r_precision)",
    )
    ranks = {"recall_at": "K of Recall@K (the data set's, or 1 2 4 8)"}
    ranks |= {"precision_at": "also Precision@K", "map_at": "also MAP@K"}
    for name, meaning in ranks.items():
        parser.add_number(f"--{name}", meaning, group=group, nargs="+", metavar="K")
    group.add_argument(
        "--ties",
        default="index",
        metavar="RULE",
        help="order of gallery images at the same distance: index, expected, optimistic or pessimistic (index)",
    )
    group.add_argument(
        "--protocol", default="exact", metavar="NAME", help="exact; or official, as the authors evaluate (exact)"
    )
    group.add_argument(
        "--per_class",
        action=TargetPath,
        nargs="?",
        const=_IN_JSON,
        metavar="FILE.csv",
        help="write the metrics of each class, into the JSON if no file is given",
    )
    group.add_argument("--clustering", action="store_true", help="also NMI and AMI of k-means, which takes long")
    parser.add_number("--seed", "of k-means (0)", key="k-means seed", group=group, default=0, metavar="N")


def _metric_options(options: argparse.Namespace) -> EvalOptions:
    from gcahng.evaluation.evaluate import EvalOptions

    return EvalOptions(
        metrics=tuple(options.metrics),
        recall_at=options.recall_at and tuple(options.recall_at),
        precision_at=tuple(options.precision_at or ()),
        map_at=tuple(options.map_at or ()),
        ties=options.ties,
        protocol=options.protocol,
        per_class=options.per_class is not None,
        clustering=options.clustering,
        seed=options.seed,
    )


def _evaluate_network(options: argparse.Namespace) -> dict[str, Any]:
    from gcahng.evaluation.evaluate import evaluate_checkpoint

    with ExitStack() as bars:

        def bar(what: str) -> Any:
            bars.close()  # the bar before
            return bars.enter_context(progress_bar(what))

        result = evaluate_checkpoint(
            options.run,
            which=options.which,
            split=options.split,
            options=_metric_options(options),
            data=data_options(options),
            device=options.device,
            timeout=options.timeout,
            progress=bar,
        )
    if result["same_data"] is False and not launched().rank:
        drawn = result["data"] == "glyphs"
        cause = "another version of matplotlib?" if drawn else "other files or sizes, or another data.exif_rotate"
        warnings.warn(f"these images differ from those of the training run ({cause})", UserNote, stacklevel=2)
    return result


def _evaluate_file(options: argparse.Namespace) -> dict[str, Any]:
    from gcahng.evaluation.evaluate import evaluate_embeddings

    with progress_bar("searching") as bar:
        return evaluate_embeddings(options.embeddings, options.gallery, options=_metric_options(options), progress=bar)


def _print_and_write(options: argparse.Namespace, result: dict[str, Any], name: str, default_json: Path) -> int:
    """Print the table and write the files; `name` is the key of the metrics in `result`."""
    if launched().rank:  # the first process prints and writes for all
        return 0
    from gcahng.files import write_json, writing
    from gcahng.runs.metrics_table import metrics_table, width_of_output

    classes = None
    if options.per_class not in (None, _IN_JSON):
        classes = result.pop("per_class")
    written = options.json or default_json
    metrics = result[name]
    print(metrics_table({f"{name} (percent)": metrics}, width_of_output()))
    if metrics["queries_without_match"]:
        print(f"left out    {metrics['queries_without_match']} queries without another image of their class")
    if "checkpoint" in result:
        steps = "" if result["steps"] is None else f", step {result['steps']}"
        print(f"checkpoint  {result['checkpoint']}{steps}")
    # Written after the table, so that the metrics are on the screen even if they cannot be written.
    if classes is not None:
        with writing(options.per_class):
            _write_classes(options.per_class, classes)
        print(f"written     {options.per_class}")
    with writing(written):
        write_json(written, result)
    print(f"written     {written}")
    return 0


def _write_classes(path: Path, classes: dict[str, dict[str, float]]) -> None:
    """Write one line for each class, whole or not at all."""
    import csv
    import io

    from gcahng.files import write_text

    names = list(next(iter(classes.values())))
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["class", *names])
    rows.writerows([name, *(values[metric] for metric in names)] for name, values in classes.items())
    write_text(path, text.getvalue())


def _default_json(options: argparse.Namespace) -> Path:
    other = data_options(options).get("name")
    split = options.split if other is None else f"{other}-{options.split}"
    run = options.run
    return run / f"eval-{options.which}-{split}.json" if run.is_dir() else run.with_suffix(f".eval-{split}.json")
