"""Whole training steps: their time, peak memory, and ratio to the reference."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from typing import Any

import torch
from _gpu_errors import OUT_OF_MEMORY, Doing, kept, release
from _gpu_timing import rotated, with_host

from gcahng.bench.agreement import Agreement
from gcahng.bench.cases import TF32, Case, Problem
from gcahng.bench.memory import plan_size
from gcahng.bench.step import spread
from gcahng.engine.free_memory import free_memory
from gcahng.engine.plan import MODES, StepSize, edge_products, expected_bytes, floor_products, largest_batch

# What the reference takes in fp64, bytes per ordered pair, channel and layer (gcahng.bench.step has it for fp32).
TRUTH_BYTES = 280
MOST_REPS, LEAST_REPS = 10, 2
LEAST_CHECK = 4  # classes
_TRUTH = "the reference in fp64"


def cases_of(item: dict[str, Any]) -> list[Case]:
    """The baselines, and then the implementations, of an item (see _gpu_items.step)."""
    size = Case(item["n"], item["views"], item["dim"], item["layers"], item["classes"], device=item["device"])
    baselines = [replace(size, impl="reference", precision=precision) for precision in item["baselines"]]
    baselines += [replace(size, impl="reference", precision=p, compiled=True) for p in item["compiled"]]
    engines = [replace(size, impl=impl, precision=item["precision"]) for impl in item["impls"]]
    graphs = [replace(case, cuda_graph=True) for case in engines] if item["graphs"] else []
    # What "auto" takes, or else the fastest, with edges in the products' dtype.
    narrow = [replace(engines[0], edge_dtype=torch.bfloat16)] if item.get("narrow") and engines else []
    return [case for case in (*baselines, *engines, *graphs, *narrow) if case.name not in item["without"]]


def measure(item: dict[str, Any], doing: Doing) -> list[dict[str, Any]]:
    """Measure the cases of an item. The row of a case that failed says why, and has no times."""
    cases, failed = cases_of(item), {}
    checks = _checks(item, cases, doing)
    problems: dict[str, Problem] = {}
    peaks: dict[str, int | None] = {}
    by_name = {case.name: case for case in cases}
    names = list(by_name)
    for name in names:  # grows below
        with kept(failed, name, doing):
            problems[name], peaks[name] = _alone(by_name[name])
        if name not in failed:
            continue
        case = by_name[name]
        if failed[name] == OUT_OF_MEMORY and case.impl != "reference" and case.memory == "store":
            smaller = replace(case, memory="recompute")
            by_name[smaller.name] = smaller
            names.append(smaller.name)
            checks[smaller.name] = _check(_size_of_check(item, smaller), [smaller], doing)[smaller.name]
    device, host = _interleaved(problems, failed, item, doing)
    problems.clear()
    release()
    return [_row(by_name[name], device.get(name), host.get(name), peaks, failed, checks[name]) for name in names]


def _alone(case: Case) -> tuple[Problem, int | None]:
    """The case's problem after two steps, and the peak of a step in bytes.

    The peak includes weights and optimizers, but nothing of other cases. It is None on the CPU.
    """
    from gcahng.engine import prepare

    prepare._workspace.clear()
    gc.collect()
    cuda = case.device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    problem = Problem(case)
    for first in (True, False):
        # A captured pass takes its memory as it is captured, in the first step, and replays in it.
        if cuda and first is case.cuda_graph:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        problem.step()
    if not cuda:
        return problem, None
    torch.cuda.synchronize()
    return problem, torch.cuda.max_memory_allocated() - before


def _interleaved(
    problems: dict[str, Problem], failed: dict[str, str], item: dict[str, Any], doing: Doing
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The seconds of each case's steps: those of the device, and those after which the host was free again."""
    device: dict[str, list[float]] = {name: [] for name in problems if name not in failed}
    host: dict[str, list[float]] = {name: [] for name in device}
    start = time.monotonic()
    for rep in range(MOST_REPS):
        for name in rotated(list(device), rep):
            if name in failed:
                continue
            with kept(failed, name, doing):
                took, launched = with_host(problems[name].step, item["device"])
                device[name].append(took)
                host[name].append(launched)
        if rep + 1 >= LEAST_REPS and time.monotonic() - start > item["seconds"]:
            break
    return device, host


# -- whether a case may have a ratio


def _checks(item: dict[str, Any], cases: list[Case], doing: Doing) -> dict[str, tuple[int, str | None]]:
    """For each case, the n at which it was compared with the reference in fp64, and what disagreed (None: nothing)."""
    return {} if not cases else _check(_size_of_check(item, cases[0]), cases, doing)


def _size_of_check(item: dict[str, Any], case: Case) -> int:
    """The case's own n, or the largest n at which the reference in fp64 should fit into the free memory."""
    free = free_memory(item["device"])
    n = case.batch
    if free is not None:
        while n > LEAST_CHECK * case.views and TRUTH_BYTES * n**2 * case.dim * case.layers > free:
            n -= case.views
    return min(n, item["largest_check"])


def _check(n: int, cases: list[Case], doing: Doing) -> dict[str, tuple[int, str | None]]:
    """Compare all cases at n, or at a smaller n if the reference in fp64 runs out of memory. Returns what `_checks`
    does."""
    failed: dict[str, str] = {}
    found: dict[str, tuple[int, str | None]] = {}
    agreement, views = None, cases[0].views
    with kept(failed, _TRUTH, doing):
        agreement = Agreement(replace(cases[0], batch=n))
    if failed.get(_TRUTH) == OUT_OF_MEMORY and n > LEAST_CHECK * views:
        return _check(views * max(LEAST_CHECK, 3 * n // (4 * views)), cases, doing)
    for case in cases:
        if agreement is not None:
            with kept(failed, case.name, doing):
                found[case.name] = n, agreement.problem(replace(case, batch=n))
        if case.name not in found:
            reason = failed.get(case.name) or failed.get(_TRUTH)
            found[case.name] = n, f"cannot be checked: {reason}"
    release()
    return found


# -- rows


def _row(
    case: Case,
    device: list[float] | None,
    host: list[float] | None,
    peaks: dict[str, int | None],
    failed: dict[str, str],
    check: tuple[int, str | None],
) -> dict[str, Any]:
    pairs = case.dim**2 * case.batch**2 / 2
    engine = case.impl != "reference"
    times = None if case.name in failed or not device else spread(device)
    return {
        "n": case.batch, "D": case.dim, "L": case.layers, "K": case.views, "M": case.classes,
        "case": case.name, "impl": case.impl, "precision": case.precision, "memory": case.memory if engine else None,
        "compiled": case.compiled, "graph": case.cuda_graph, "narrow": case.edge_dtype is not None,
        "failed": failed.get(case.name),
        "step_s": times, "host_s": spread(host) if times else None, "all_s": device or [],
        "peak_bytes": peaks.get(case.name),
        "expected_bytes": expected_bytes(fused_size(case), case.memory) if engine else None,
        "floor_flops": 2 * floor_products(case.layers, case.memory != "hidden") * pairs,
        "done_flops": 2 * edge_products(case.layers, case.memory) * pairs if engine else None,
        "checked_at": check[0], "disagrees": check[1],
    }  # fmt: skip


def add_ratios(rows: list[dict[str, Any]], rates: dict[str, float]) -> None:
    """Add ratios and shares to the rows of one n and L.

    A ratio is the reference's median divided by the case's, for each case of the reference. The share is that of the
    floor: the time of the products that a step cannot do without, at the best rate measured for the precision, divided
    by the step's. Both are None for a case that disagrees or was not measured.
    """
    known = {row["case"]: row["step_s"]["median"] for row in rows if row["impl"] == "reference" and row["step_s"]}
    for row in rows:
        sound = row["step_s"] is not None and row["disagrees"] is None
        row["ratios"], row["share_of_floor"] = {}, None
        if not sound or row["impl"] == "reference":
            continue
        row["ratios"] = {name: seconds / row["step_s"]["median"] for name, seconds in known.items()}
        if row["precision"] in rates:
            row["share_of_floor"] = row["floor_flops"] / rates[row["precision"]] / row["step_s"]["median"]


def fused_size(case: Case) -> StepSize:
    """The sizes of a case, in the form that the planner takes."""
    return plan_size(replace(case, precision="fp32") if case.precision == TF32 else case)


def plan(item: dict[str, Any], doing: Doing) -> list[dict[str, Any]]:
    """The largest batch that fits into the whole card according to the planner, for each mode."""
    total = torch.cuda.get_device_properties(0).total_memory if item["device"] == "cuda" else 2**30
    rows = []
    for layers in item["layers"]:
        for precision in item["precisions"]:
            for impl in item["impls"]:
                doing(f"{impl} {precision}")
                case = Case(4 * item["views"], item["views"], item["dim"], layers, 100, impl, precision)
                size = fused_size(replace(case, device=item["device"]))
                largest = {memory: largest_batch(size, memory, total) for memory in MODES}
                rows.append({"L": layers, "precision": precision, "impl": impl, "bytes": total, "largest": largest})
    return rows
