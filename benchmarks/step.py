"""Time of a training step of the loss, against the fp32 reference, in one process and interleaved.

    python benchmarks/step.py                           # n = 81 and 129, D = 512, L = 2, fp32 and bf16
    python benchmarks/step.py --batch 48 --dim 64 --layers 1
    python benchmarks/step.py --json benchmarks/results/step.json

A step is the loss's forward, its backward and generator_step; forward is the graph network up to θ, in training mode
and without gradient. No ratio is printed for a case whose outputs disagree with the reference (gcahng.bench.gate).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from gcahng.bench.cases import Case, Problem
from gcahng.bench.gate import Gate

CASES = (("fp32", "store"), ("fp32", "hidden"), ("bf16", "store"), ("bf16", "hidden"))


def product_rate(dtype: torch.dtype, rows: int, dim: int) -> float:
    """Measured FLOP/s of the edge MLP's first product on a tile of so many rows: the ceiling of a step."""
    x, w = torch.randn(rows, dim).to(dtype), torch.randn(4 * dim, dim).to(dtype)
    out = torch.empty(rows, 4 * dim, dtype=dtype)
    times = [timed(lambda: torch.mm(x, w.T, out=out)) for _ in range(20)]
    return 2 * rows * dim * 4 * dim / statistics.median(times[5:])


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.2, 0.8)]
    return {"median": statistics.median(ordered), "p20": at[0], "p80": at[1]}


def flops(batch: int, dim: int, layers: int, replay: bool) -> float:
    """A step's products on half of the pairs: 64 L - 16 (replay) or 54 L - 13 of D × D for each of n²/2 pairs."""
    return 2 * (64 * layers - 16 if replay else 54 * layers - 13) * dim**2 * batch**2 / 2


def measure(batch: int, args: argparse.Namespace) -> list[dict]:
    size = {"batch": batch, "views": args.views, "dim": args.dim, "layers": args.layers}
    baseline = Case(**size, impl="reference")
    cases = [Case(**size, impl=args.impl, precision=precision, memory=memory) for precision, memory in CASES]
    gate = Gate(baseline)
    problems = {case: Problem(case) for case in (baseline, *cases)}
    wrong = {case: gate.problem(case) for case in cases}
    steps: dict[Case, list[float]] = {case: [] for case in problems}
    forwards: dict[Case, list[float]] = {case: [] for case in problems}
    for problem in problems.values():
        problem.step()
        problem.forward()
    for _ in tqdm(range(args.reps), desc=f"n = {batch}", file=sys.stderr):
        for case, problem in problems.items():
            steps[case].append(timed(problem.step))
            forwards[case].append(timed(problem.forward))
    rates = {"fp32": product_rate(torch.float32, 512, args.dim), "bf16": product_rate(torch.bfloat16, 1024, args.dim)}
    rows = []
    for case in problems:
        step, forward = spread(steps[case]), spread(forwards[case])
        row = {"n": batch, "D": args.dim, "L": args.layers, "K": args.views, "case": case.name}
        row |= {"step_s": step, "forward_s": forward, "disagrees": wrong.get(case)}
        if case is not baseline and wrong[case] is None:
            row["step_ratio"] = spread(steps[baseline])["median"] / step["median"]
            row["forward_ratio"] = spread(forwards[baseline])["median"] / forward["median"]
            floor = flops(batch, args.dim, args.layers, case.memory != "hidden") / rates[case.precision]
            row |= {"product_rate": rates[case.precision], "share_of_floor": floor / step["median"]}
        rows.append(row)
    return rows


def settings() -> dict[str, str | int]:
    """What timings depend on."""
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_NUM_THREADS")
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "model: ?")
    return {
        "cpu": model.partition(":")[2].strip(),
        "bf16": "amx" if "amx_bf16" in Path("/proc/cpuinfo").read_text() else "no amx",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        **{name: os.environ.get(name, "unset") for name in names},
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| n | D | L | case | step (p20–p80), s | × reference | up to θ, s | × reference | share of product floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        step, forward = r["step_s"], r["forward_s"]
        times = f"{step['median']:.3f} ({step['p20']:.3f}–{step['p80']:.3f}) | "
        cells = f"| {r['n']} | {r['D']} | {r['L']} | {r['case']} | {times}"
        if "step_ratio" in r:
            cells += f"{r['step_ratio']:.2f} | {forward['median']:.3f} | {r['forward_ratio']:.2f} | "
            cells += f"{100 * r['share_of_floor']:.0f} % |"
        else:
            cells += f"{r['disagrees'] or '–'} | {forward['median']:.3f} | – | – |"
        lines.append(cells)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[81, 129], help="n, a multiple of --views")
    parser.add_argument("--views", type=int, default=3, help="K")
    parser.add_argument("--dim", type=int, default=512, help="D")
    parser.add_argument("--layers", type=int, default=2, help="L")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for batch in args.batch for row in measure(batch, args)]
    print(json.dumps(settings()))
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"settings": settings(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
