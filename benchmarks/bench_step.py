"""Times a training step and the graph network's forward pass, for every implementation that is available here.

    python -m pytest benchmarks/bench_step.py

Each case is compared with the reference before it is timed (gcahng.bench.agreement). A case that disagrees fails and is
not timed. For ratios, use `gcahng bench step`, which interleaves cases and prints the share of the measured rate of
products.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

from gcahng.bench.agreement import Agreement
from gcahng.bench.cases import EDGE_MEMORY, Case, Problem
from gcahng.dispatch import ORDER, available
from gcahng.engine.plan import floor_products

# (n, D, L)
SIZES = [(48, 64, 1), (81, 128, 2)]
CASES = [
    Case(batch, dim=dim, layers=layers, impl=impl, precision=precision, memory=memory)
    for batch, dim, layers in SIZES
    for precision in ("fp32", "bf16")
    for impl in ORDER["cpu"]
    if available(impl, "cpu") is None
    for memory in (EDGE_MEMORY if impl != "reference" else ("store",))
]


def size_id(case: Case) -> str:
    """n, D, L and the name of the case."""
    return f"{case.batch}-{case.dim}-{case.layers}-{case.name.replace(' ', '-')}"


@lru_cache
def agreement(batch: int, dim: int, layers: int) -> Agreement:
    return Agreement(Case(batch, dim=dim, layers=layers))


@pytest.mark.parametrize("part", ["forward", "step"])
@pytest.mark.parametrize("case", CASES, ids=size_id)
def test_step(case: Case, part: str, benchmark) -> None:
    benchmark.group = f"{part}, n = {case.batch}, D = {case.dim}, L = {case.layers}"
    problem = agreement(case.batch, case.dim, case.layers).problem(case)
    assert problem is None, problem
    call = getattr(Problem(case), part)
    call()
    benchmark(call)
    if benchmark.stats is not None and part == "step":  # --benchmark-disable runs the call once and times nothing
        flops = floor_products(case.layers, case.memory != "hidden") * case.dim**2 * case.batch**2
        benchmark.extra_info["GFLOP/s of the floor"] = round(flops / benchmark.stats.stats.median / 1e9, 1)
