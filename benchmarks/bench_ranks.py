"""A training step whose batch several processes share, against one process: time, and each process's peak memory.

    python benchmarks/bench_ranks.py --batch 192 384 --processes 1 2
    python benchmarks/bench_ranks.py --batch 12 --dim 32 --reps 1      # a check that it runs

Processes talk over gloo on this machine and divide its cores among them, so that time says what sharing costs, not what
further devices would bring. Peaks are measured as `gcahng bench memory` does, and beside them stands what `gcahng plan`
expects. A count of processes whose losses or gradients differ from one process's by more than rounding is not shown.
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

# Of a float32 step against another whose sums are added in another order, relative to the largest entry.
ROUNDING = 1e-4


def process(rank: int, count: int, threads: int, case: Case, reps: int, folder: str) -> None:
    """One process's measurements, into a file."""
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
    """What each of the processes measured."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (count, max(1, threads // count), case, reps, folder), nprocs=count)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(count)]


def disagreement(found: list[dict[str, Any]], one: dict[str, Any]) -> float:
    """The largest difference of the first step from one process's, relative to what it is of."""
    gradient = torch.cat([each["gradient"] for each in found])
    largest = float((gradient - one["gradient"]).abs().max() / one["gradient"].abs().max())
    for each in found:
        for name, value in one["first"].items():
            largest = max(largest, abs(each["first"][name] - value) / max(abs(value), 1e-3))
    return largest


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[192, 384])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--memory", choices=EDGE_MEMORY, default="store")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
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
                raise UserError(f"--batch {batch} is no multiple of --processes {count}; parts must be equal")
            found = one if count == 1 else run(case, count, threads, options.reps)
            yield row(case, count, max(1, threads // count), found, disagreement(found, one[0]))


def row(case: Case, count: int, threads: int, found: list[dict[str, Any]], off: float) -> dict[str, Any]:
    """UserError for processes that do not compute what one computes."""
    if off > ROUNDING:
        raise UserError(f"{count} processes at n = {case.batch} differ from one by {off:.1e}, more than {ROUNDING:.0e}")
    slowest = [max(times) for times in zip(*(each["times"] for each in found), strict=True)]
    return {
        "n": case.batch,
        "D": case.dim,
        "L": case.layers,
        "case": case.name,
        "processes": count,
        "threads": threads,
        "step_s": statistics.median(slowest),
        "all_s": slowest,
        "peaks": [each["peak"] for each in found],
        "expected": expected_bytes(replace(plan_size(case), ranks=count), case.memory),
        "off": off,
    }


def text(row: dict[str, Any]) -> str:
    """A line of the table."""
    peaks = " / ".join(f"{peak / 1e6:.0f}" for peak in row["peaks"])
    cells = (row["n"], row["processes"], row["threads"], f"{row['step_s']:.3f}", peaks, f"{row['expected'] / 1e6:.0f}")
    return f"| {' | '.join(map(str, cells))} | {row['off']:.0e} |"


if __name__ == "__main__":
    raise SystemExit(main())
