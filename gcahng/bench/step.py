"""Measures and prints times and peaks of a training step against the reference in fp32, for `gcahng bench step`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from gcahng.bench.agreement import Agreement
from gcahng.bench.cases import Case, Problem
from gcahng.bench.peak import measure_peak
from gcahng.bench.progress import ProgressBar
from gcahng.bench.system import ProductRate, seconds
from gcahng.engine.free_memory import free_memory
from gcahng.engine.plan import edge_products, floor_products

# The authors' code at D = 512 and L = 2: core-seconds of a step and of the graph network's forward pass for each batch,
# on cores whose fp32 matrix products run at 88 to 100 GFLOP/s.
AUTHORS = {80: (6.4, 1.37), 128: (22.7, 4.38)}
# Peak memory of the reference in fp32: bytes per ordered pair, channel and layer, as measured at D = 512.
REFERENCE_BYTES = 140


def spread(times: Sequence[float]) -> dict[str, float]:
    """The median and the 20th and 80th percentiles (nearest rank)."""
    ordered = sorted(times)
    low, high = (ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in (0.2, 0.8))
    return {"median": statistics.median(ordered), "p20": low, "p80": high}


def measure(sizes: Sequence[Case], variants: Sequence[Case], reps: int, peaks: bool) -> dict[str, Any]:
    """Measure variants and the fp32 reference at each size, interleaved.

    Args:
        sizes: cases that give the sizes.
        variants: cases that give the implementation, the precision and the memory mode.
        reps: number of repetitions.
        peaks: whether to measure peak memory too, which takes a process for each case.

    Returns:
        "rates", the FLOP/s of matrix products, and "rows", one for each case and size, with times in seconds and memory
        in bytes. A row's "disagrees" says why the case has no ratios; it is None if it has.
    """
    cases = []
    for size in sizes:
        baseline = replace(size, impl="reference", precision="fp32")
        others = [_variant(size, variant) for variant in variants]
        cases.append([baseline, *(case for case in others if case.name != baseline.name)])
    dims = {size.dim for size in sizes}
    precisions = sorted({"fp32", *(variant.precision for variant in variants)})
    products = {(dim, precision): ProductRate(dim, precision) for dim in dims for precision in precisions}
    times: dict[tuple[int, str], list[float]] = {key: [] for key in products}
    rows = []
    count = len(cases[0])
    with ProgressBar(len(sizes) * (count * (reps + 1 + peaks) + 1)) as progress:
        for group in cases:
            rows += _measure_size(group, reps, peaks, products, times, progress)
    rates = {key: products[key].flops / statistics.median(own) for key, own in times.items()}
    for row in rows:
        _add_share(row, rates[row["D"], row["precision"]])
    return {"rates": {f"{precision}, D = {dim}": rate for (dim, precision), rate in rates.items()}, "rows": rows}


def _variant(size: Case, variant: Case) -> Case:
    return replace(size, impl=variant.impl, precision=variant.precision, memory=variant.memory)


def _measure_size(
    cases: list[Case],
    reps: int,
    peaks: bool,
    products: dict[tuple[int, str], ProductRate],
    rates: dict[tuple[int, str], list[float]],
    progress: ProgressBar,
) -> list[dict[str, Any]]:
    baseline, *others = cases
    disagrees = _disagreements(baseline, others, progress)
    if not _fits(baseline, REFERENCE_BYTES):
        cases = others
        for _ in range(reps + peaks):
            progress.done()
    problems = {case: Problem(case) for case in cases}
    steps: dict[Case, list[float]] = {case: [] for case in cases}
    forwards: dict[Case, list[float]] = {case: [] for case in cases}
    for problem in problems.values():
        problem.step()
        problem.forward()
    for rep in range(reps):
        for key, product in products.items():
            rates[key] += [product() for _ in range(5)]
        for case in (
            *cases[rep % len(cases) :],
            *cases[: rep % len(cases)],
        ):  # so that no case always follows the same one
            progress.doing(f"n = {case.batch}, {case.name}")
            forwards[case].append(seconds(problems[case].forward))
            steps[case].append(seconds(problems[case].step))
            progress.done()
    del problems
    rows = []
    for case in cases:
        step, forward = spread(steps[case]), spread(forwards[case])
        rest = spread([s - 2 * f for s, f in zip(steps[case], forwards[case], strict=True)])
        row = {
            "n": case.batch, "D": case.dim, "L": case.layers, "K": case.views, "M": case.classes,
            "case": case.name, "precision": case.precision, "memory": case.memory,
            "forward_s": forward, "rest_s": rest, "step_s": step, "disagrees": disagrees[case],
            "peak_bytes": None, "all_s": {"forward": forwards[case], "step": steps[case]},
        }  # fmt: skip
        if peaks:
            progress.doing(f"n = {case.batch}, peak of {case.name}")
            row["peak_bytes"] = measure_peak(case).peak
            progress.done()
        if disagrees[case] is None:
            base_step, base_forward = spread(steps[baseline])["median"], spread(forwards[baseline])["median"]
            if case is not baseline:
                row |= {"step_ratio": base_step / step["median"], "forward_ratio": base_forward / forward["median"]}
            row |= _authors_ratios(case, step["median"], forward["median"])
        rows.append(row)
    return rows


def _disagreements(baseline: Case, others: list[Case], progress: ProgressBar) -> dict[Case, str | None]:
    """For each case, why it has no ratios; None if it agrees with the reference."""
    reasons: dict[Case, str | None] = {baseline: None}
    if not _fits(baseline, 2 * REFERENCE_BYTES):
        needed, free = _needed(baseline, 2 * REFERENCE_BYTES), free_memory("cpu")
        reason = (
            f"it cannot be checked, because the reference in fp64 needs about {needed / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free"
        )
        for _ in range(len(others) + 2):
            progress.done()
        return reasons | dict.fromkeys(others, reason)
    progress.doing(f"n = {baseline.batch}, the reference in fp64")
    agreement = Agreement(baseline)
    progress.done()
    progress.done()
    for case in others:
        progress.doing(f"n = {case.batch}, checking {case.name}")
        reasons[case] = agreement.problem(case)
        progress.done()
    return reasons


def _needed(case: Case, bytes_each: int) -> int:
    return bytes_each * case.batch**2 * case.dim * case.layers


def _fits(case: Case, bytes_each: int) -> bool:
    """Whether there is room for `bytes_each` bytes per ordered pair, channel and layer. True if this is not known."""
    free = free_memory("cpu")
    return free is None or _needed(case, bytes_each) <= free


def _authors_ratios(case: Case, step: float, forward: float) -> dict[str, float]:
    """Core-seconds of the authors' code over those of this case, at the same batch or one that is a sample smaller."""
    theirs = AUTHORS.get(case.batch) or AUTHORS.get(case.batch - 1)
    if theirs is None or (case.dim, case.layers) != (512, 2):
        return {}
    threads = torch.get_num_threads()
    return {
        "authors_step_ratio": theirs[0] / (step * threads),
        "authors_forward_ratio": theirs[1] / (forward * threads),
    }


def _add_share(row: dict[str, Any], rate: float) -> None:
    """Add the floor of a step: the products that it cannot do without, on n²/2 pairs, at the measured rate."""
    replay = row["memory"] != "hidden"
    pairs = row["D"] ** 2 * row["n"] ** 2 / 2
    floor = 2 * floor_products(row["L"], replay) * pairs
    row["floor_flops"] = floor
    row["done_flops"] = 2 * edge_products(row["L"], row["memory"]) * pairs
    row["share_of_floor"] = None
    if row["disagrees"] is None and not row["case"].startswith("reference"):
        row["share_of_floor"] = floor / rate / row["step_s"]["median"]


def table(result: dict[str, Any]) -> str:
    """A Markdown table of what `measure` returned, and the meaning of its columns."""
    lines = [
        "| n | case | up to θ, s | rest, s | step, s | peak, MB | step × | up to θ × | authors × | share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for row in result["rows"]:
        times = [_times(row[name]) for name in ("forward_s", "rest_s", "step_s")]
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        ratios = [row.get(name) for name in ("step_ratio", "forward_ratio", "authors_step_ratio")]
        cells = [f"{ratio:.2f}" if ratio else "–" for ratio in ratios]
        share = f"{100 * row['share_of_floor']:.0f} %" if row["share_of_floor"] else "–"
        lines.append(f"| {' | '.join([str(row['n']), row['case'], *times, peak, *cells, share])} |")
        if row["disagrees"]:
            notes.append(f"No ratio for {row['case']} at n = {row['n']}: {row['disagrees']}.")
    rates = "; ".join(f"{name}: {rate / 1e9:.0f} GF/s" for name, rate in result["rates"].items())
    return "\n".join([*lines, "", *notes, *_legend(result["rows"]), f"Matrix products measured in this run: {rates}."])


def _times(times: dict[str, float]) -> str:
    digits = 4 if times["median"] < 0.1 else 3
    return f"{times['median']:.{digits}f} ({times['p20']:.{digits}f}–{times['p80']:.{digits}f})"


def _legend(rows: list[dict[str, Any]]) -> list[str]:
    threads = torch.get_num_threads()
    lines = [
        "Times are the median (20th–80th percentile). up to θ: the graph network in training mode without a gradient,",
        "which drops each tile of θ (the reference keeps it). step: loss, backward and generator_step. rest: a step",
        "minus twice the time up to θ. The engine computes the gradients of a pass together with its losses, so",
        "loss.backward() alone would take almost no time. ×: the median of the fp32 reference over that of the case.",
    ]
    if any("authors_step_ratio" in row for row in rows):
        lines.append(
            "authors ×: the core-seconds of the authors' code, 6.4 per step at n = 80 and 22.7 at n = 128 on cores "
            f"whose fp32 products run at 88–100 GFLOP/s, over the seconds of this case times {threads} thread(s)."
        )
    layers = sorted({row["L"] for row in rows})
    formulas = ", ".join(
        f"{floor_products(n, True) / 2:g} D² n² multiply-adds at L = {n} ({floor_products(n, False) / 2:g} hidden)"
        for n in layers
    )
    return [
        *lines,
        f"share: the time that the products of a step would take at the measured rate, over its time: {formulas}.",
    ]
