"""Where a step's time goes on the CPU, against the floor of its matrix products: what the library's products take in
the step, what the fused stages take, and all the rest.

    python benchmarks/bench_floor.py                          # n = 129, D = 512, L = 2, fp32 and bf16
    python benchmarks/bench_floor.py --batch 12 --dim 32      # that it runs

The floor is what `gcahng bench step` divides by the step's time: the products that a step cannot do without, at the
rate of one that is repeated with its operands in the caches. torch's profiler says what the main thread spends in
products and in stages (both run on all threads); times are scaled to those of steps without the profiler. "at best" is
the share that would be left if the step were its products and stages alone, or its products alone, as they run in it
now: no dispatch, no optimizer, no losses.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

from gcahng.bench.cases import EDGE_MEMORY, Case, Problem
from gcahng.bench.rows import show
from gcahng.bench.system import ProductRate, seconds
from gcahng.engine.plan import floor_products
from gcahng.errors import UserError
from gcahng.ops._stages import STAGES

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_")
WARM_UP = 3


def measure(case: Case, reps: int) -> dict[str, Any]:
    """Seconds of a step and of its parts."""
    problem, product = Problem(case), ProductRate(case.dim, case.precision)
    for _ in range(WARM_UP):
        problem.step()
    steps, rates = [], []
    for _ in range(reps):
        rates.append(product.rate(5))
        steps.append(seconds(problem.step))
    step = statistics.median(steps)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        profiled = sum(seconds(problem.step) for _ in range(reps)) / reps
    scale = step / profiled / reps / 1e6
    products = stages = 0.0
    for event in found.key_averages():
        if event.key in PRODUCTS:
            products += event.self_cpu_time_total * scale
        elif event.key.removeprefix("gcahng::") in STAGES:
            stages += event.self_cpu_time_total * scale
    return row(case, statistics.median(rates), step, products, stages) | {"all_s": steps}


def row(case: Case, rate: float, step: float, products: float, stages: float) -> dict[str, Any]:
    """What follows from the times."""
    flops = 2 * floor_products(case.layers, case.memory != "hidden") * case.dim**2 * case.batch**2 / 2
    floor = flops / rate
    return {
        "n": case.batch,
        "D": case.dim,
        "L": case.layers,
        "case": case.name,
        "rate": rate,
        "floor_s": floor,
        "step_s": step,
        "products_s": products,
        "stages_s": stages,
        "share": floor / step,
        "share_of_products_and_stages": floor / (products + stages),
        "share_of_products": floor / products,
    }


def text(row: dict[str, Any]) -> str:
    """A line of the table."""
    times = (row[f"{name}_s"] for name in ("floor", "step", "products", "stages"))
    shares = (row[name] for name in ("share", "share_of_products_and_stages", "share_of_products"))
    cells = [row["n"], row["case"], f"{row['rate'] / 1e9:.0f}", *(f"{s:.3f}" for s in times)]
    return f"| {' | '.join(map(str, [*cells, *(f'{100 * share:.0f} %' for share in shares)]))} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[129])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--memory", choices=EDGE_MEMORY, default="store")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    head = "| n | case | GF/s | floor, s | step, s | products, s | stages, s | share | at best, both | products alone |"
    return show("bench_floor", head, _rows(options), text, options.json)


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for batch in options.batch:
        for precision in options.precision:
            sizes = {"dim": options.dim, "layers": options.layers, "classes": max(100, batch // 3)}
            case = Case(batch, impl="auto", precision=precision, memory=options.memory, **sizes)
            if case.implementation != "cpp":
                raise UserError(f"stages are {case.implementation} here; what they take is told of cpp alone")
            yield measure(case, options.reps)


if __name__ == "__main__":
    raise SystemExit(main())
