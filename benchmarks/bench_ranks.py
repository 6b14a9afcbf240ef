"""Time and peak memory of a training step whose batch several processes share, compared with one process.

    python benchmarks/bench_ranks.py --batch 192 384 --processes 1 2
    python benchmarks/bench_ranks.py --batch 12 --dim 32 --reps 1      # a check that it runs

The processes communicate through gloo on this machine and share its cores. So the time shows what sharing costs, not
what more devices would gain. Peaks are measured as in `gcahng bench memory`, and shown beside the estimate of
`gcahng plan`. A number of processes is not shown if their losses or gradients differ from those of one process by more
than rounding.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gcahng.bench.cases import EDGE_MEMORY, Case, Problem
from gcahng.bench.memory import plan_size
from gcahng.bench.peak import measure_here
from gcahng.bench.rows import show
from gcahng.engine.plan import expected_bytes
from gcahng.errors import UserError

# The error of a float32 step whose sums are added in another order, relative to the largest entry.
ROUNDING = 1e-4


def process(rank: int, count: int, threads: int, case: Case, reps: int, folder: str) -> None:
    """Measure in this process, and write the result to a file."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    problem = Problem(case, process_group="world")
    peak = measure_here(problem, warm_up=2 * case.views * count).peak
    problem = Problem(case, process_group="world")
    first = {name: float(value) for name, value in problem.step().items()}
    gradient = problem.embeddings.grad / count
    times = []
    for _ in range(reps):
        dist.barrier()
        start = time.perf_counter()
        problem.step()
        times.append(time.perf_counter() - start)
    torch.save({"peak": peak, "first": first, "gradient": gradient, "times": times}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run(case: Case, count: int, threads: int, reps: int) -> list[dict[str, Any]]:
    """The results of all processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (count, max(1, threads // count), case, reps, folder), nprocs=count)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(count)]


def disagreement(results: list[dict[str, Any]], one: dict[str, Any]) -> float:
    """The largest relative difference between the first step of all processes and that of one process."""
    gradient = torch.cat([result["gradient"] for result in results])
    largest = float((gradient - one["gradient"]).abs().max() / one["gradient"].abs().max())
    for result in results:
        for name, value in one["first"].items():
            largest = max(largest, abs(result["first"][name] - value) / max(abs(value), 1e-3))
    return largest


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[192, 384], help="batch sizes (192 384)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (1 2)")
    parser.add_argument("--dim", type=int, default=512, help="embedding channels (512)")
    parser.add_argument("--layers", type=int, default=2, help="graph layers (2)")
    parser.add_argument("--memory", choices=EDGE_MEMORY, default="store")
    parser.add_argument("--reps", type=int, default=3, help="repetitions (3)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    head = "| n | processes | threads each | step, s | peak of each, MB | expected, MB | off by |"
    return show("bench_ranks", head, _rows(options), text, options.json)


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    for batch in options.batch:
        classes = max(100, batch // 3)
        case = Case(batch, dim=options.dim, layers=options.layers, memory=options.memory, classes=classes)
        one = run(case, 1, threads, options.reps)
        for count in sorted(set(options.processes)):
            if batch % count:
                raise UserError(
                    f"--batch is {batch}; it must be a multiple of --processes {count}, so that parts are equal"
                )
            results = one if count == 1 else run(case, count, threads, options.reps)
            yield row(case, count, max(1, threads // count), results, disagreement(results, one[0]))


def row(case: Case, count: int, threads: int, results: list[dict[str, Any]], off: float) -> dict[str, Any]:
    """A row of the table.

    Raises:
        UserError: the processes do not compute what one process computes.
    """
    if off > ROUNDING:
        raise UserError(
            f"{count} processes at n = {case.batch} differ from one by {off:.1e}; they may differ by {ROUNDING:.0e}"
        )
    slowest = [max(times) for times in zip(*(result["times"] for result in results), strict=True)]
    return {
        "n": case.batch,
        "D": case.dim,
        "L": case.layers,
        "case": case.name,
        "processes": count,
        "threads": threads,
        "step_s": statistics.median(slowest),
        "all_s": slowest,
        "peaks": [result["peak"] for result in results],
        "expected": expected_bytes(replace(plan_size(case), ranks=count), case.memory),
        "off": off,
    }


def text(row: dict[str, Any]) -> str:
    """A row as a line of the table."""
    peaks = " / ".join(f"{peak / 1e6:.0f}" for peak in row["peaks"])
    cells = (row["n"], row["processes"], row["threads"], f"{row['step_s']:.3f}", peaks, f"{row['expected'] / 1e6:.0f}")
    return f"| {' | '.join(map(str, cells))} | {row['off']:.0e} |"


if __name__ == "__main__":
    raise SystemExit(main())
