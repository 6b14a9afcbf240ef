"""Splits the time of a step on the CPU into matrix products of the library, fused stages and the rest, and compares it
with the floor of its products.

    python benchmarks/bench_floor.py                          # n = 129, D = 512, L = 2, fp32 and bf16
    python benchmarks/bench_floor.py --batch 12 --dim 32      # a check that it runs

The floor is what `gcahng bench step` divides by the time of a step: the time of the products that a step cannot do
without, at the rate of a product that is repeated with its operands in the caches. torch's profiler measures the time
that the main thread spends in products and in stages, both of which run on all threads. These times are scaled to
those of steps without the profiler. "at best" is the share that a step would reach if it consisted of its products and
stages, or of its products alone, at their present speed, without dispatch, optimizer and losses.
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
from gcahng.engine.schema import OPS
from gcahng.errors import UserError

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_")
WARM_UP = 3


def measure(case: Case, reps: int) -> dict[str, Any]:
    """Measure the seconds of a step and of its parts."""
    problem, product = Problem(case), ProductRate(case.dim, case.precision)
    for _ in range(WARM_UP):
        problem.step()
    steps, rates = [], []
    for _ in range(reps):
        rates.append(product.rate(5))
        steps.append(seconds(problem.step))
    step = statistics.median(steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        profiled = sum(seconds(problem.step) for _ in range(reps)) / reps
    scale = step / profiled / reps / 1e6
    products = stages = 0.0
    for event in profiler.key_averages():
        if event.key in PRODUCTS:
            products += event.self_cpu_time_total * scale
        elif event.key.removeprefix("gcahng::") in OPS:
            stages += event.self_cpu_time_total * scale
    return row(case, statistics.median(rates), step, products, stages) | {"all_s": steps}


def row(case: Case, rate: float, step: float, products: float, stages: float) -> dict[str, Any]:
    """A row of the result, with the shares that follow from the times."""
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
    """A row as a line of the table."""
    times = (row[f"{name}_s"] for name in ("floor", "step", "products", "stages"))
    shares = (row[name] for name in ("share", "share_of_products_and_stages", "share_of_products"))
    cells = [row["n"], row["case"], f"{row['rate'] / 1e9:.0f}", *(f"{s:.3f}" for s in times)]
    return f"| {' | '.join(map(str, [*cells, *(f'{100 * share:.0f} %' for share in shares)]))} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[129], help="batch sizes (129)")
    parser.add_argument("--dim", type=int, default=512, help="embedding channels (512)")
    parser.add_argument("--layers", type=int, default=2, help="graph layers (2)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--memory", choices=EDGE_MEMORY, default="store")
    parser.add_argument("--reps", type=int, default=5, help="repetitions (5)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    head = "| n | case | GF/s | floor, s | step, s | products, s | stages, s | share | at best, both | products alone |"
    return show("bench_floor", head, _rows(options), text, options.json)


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for batch in options.batch:
        for precision in options.precision:
            sizes = {"dim": options.dim, "layers": options.layers, "classes": max(100, batch // 3)}
            case = Case(batch, impl="auto", precision=precision, memory=options.memory, **sizes)
            if case.implementation != "cpp":
                raise UserError(f"the stages are {case.implementation}; they must be cpp to be measured")
            yield measure(case, options.reps)


if __name__ == "__main__":
    raise SystemExit(main())
