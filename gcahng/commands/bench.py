"""gcahng bench"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gcahng.commands.arguments import Parser, TargetPath


def run(arguments: list[str]) -> int:
    """Measure the loss on this machine: `step` measures times, `memory` measures peaks."""
    parser = Parser(prog="gcahng bench", description=run.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{step,memory}", parser_class=Parser)
    step = commands.add_parser(
        "step",
        help="time of the forward, of the rest and of the whole step, against the fp32 reference",
        description=_step.__doc__,
    )
    _add_sizes(step, batch=[81, 129])
    step.add_argument("--impl", nargs="+", default=["auto"], help="implementations of the loss (auto)")
    step.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "fp64"), default=["fp32", "bf16"])
    step.add_number("--reps", "repetitions (5)", default=5, metavar="N")
    step.add_argument("--no-peak", action="store_true", help="leave out the peaks, each of which takes a process")
    memory = commands.add_parser("memory", help="peak memory by batch size and mode", description=_memory.__doc__)
    _add_sizes(memory, batch=[129, 192, 384, 513, 768], modes=["store", "hidden", "recompute"])
    memory.add_argument("--impl", nargs="+", default=["auto"], help="implementations of the loss (auto)")
    memory.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "fp64"), default=["fp32"])
    memory.add_number("--steps", "steps in each process (2)", default=2, metavar="N")
    memory.add_argument(
        "--no-classes", action="store_true", help="leave out the case with M = 11,318 classes at n = 243"
    )
    options = parser.parse_args(arguments)
    return {"step": _step, "memory": _memory}[options.command](options)


def _add_sizes(parser: Parser, batch: list[int], modes: list[str] | None = None) -> None:
    modes = modes or ["store", "hidden"]
    shown = " ".join(map(str, batch))
    parser.add_number("--batch", f"batch sizes ({shown})", nargs="+", default=batch, metavar="N")
    parser.add_number("--views", "samples of each class (3)", default=3, metavar="K")
    parser.add_number("--dim", "embedding channels (512)", default=512, metavar="D")
    parser.add_number("--layers", "graph layers (2)", default=2, metavar="L")
    parser.add_number("--classes", "training classes (100, or as many as the batch has)", metavar="M")
    parser.add_argument(
        "--memory", nargs="+", choices=("store", "hidden", "recompute"), default=modes,
        help=f"how edges are stored ({' '.join(modes)})",
    )  # fmt: skip
    parser.add_argument("--json", action=TargetPath, metavar="FILE", help="write all numbers as JSON")


def _cases(options: argparse.Namespace) -> list[Any]:
    """The cases that the options describe, in one list for each batch size."""
    from gcahng.bench.cases import Case

    groups = []
    for batch in options.batch:
        classes = options.classes or max(100, batch // options.views)
        sizes = (batch, options.views, options.dim, options.layers, classes)
        group = [
            Case(*sizes, impl, precision, memory)
            for impl in options.impl
            for precision in options.precision
            for memory in (options.memory if impl != "reference" else options.memory[:1])
        ]
        for case in group:
            _ = case.implementation  # raises UserError where it is not available
        groups.append(list({case.name: case for case in group}.values()))
    return groups


def _step(options: argparse.Namespace) -> int:
    """Time a training step and its forward for each implementation, precision and mode, against the fp32 reference.

    All cases take turns in one process. Each is first compared with the reference in fp64; one that disagrees gets no
    ratio.
    """
    from gcahng.bench import step, system
    from gcahng.bench.memory import plan_size
    from gcahng.engine.fits import check_step

    groups = _cases(options)
    for case in (case for group in groups for case in group):
        check_step(plan_size(case), case.device, case.memory)
    settings = system.settings()
    print(system.describe(settings))
    sizes, variants = [group[0] for group in groups], groups[0]
    results = step.measure(sizes, variants, options.reps, peaks=not options.no_peak)
    print(f"\n{step.table(results)}")
    _write(options.json, {"settings": settings, **results})
    return 0


def _memory(options: argparse.Namespace) -> int:
    """Measure the peak memory of a training step, each case in a process of its own."""
    from dataclasses import replace

    from gcahng.bench import memory, system

    groups = _cases(options)
    settings = system.settings()
    print(system.describe(settings))
    extra = []
    if not options.no_classes:
        many = replace(groups[0][0], batch=81 * options.views, classes=11318)
        extra = [(many, replace(many, classes=100))]
    rows = memory.measure([case for group in groups for case in group], extra, options.steps)
    print(f"\n{memory.table(rows)}")
    _write(options.json, {"settings": settings, "rows": rows})
    return 0


def _write(path: Path | None, values: dict[str, Any]) -> None:
    if path is None:
        return
    from gcahng.files import write_text, writing

    with writing(path):
        write_text(path, json.dumps(values, indent=1) + "\n")
    print(f"written {path}")
