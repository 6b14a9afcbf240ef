"""Times and peaks of a training step against the reference in fp32: what `gcahng bench step` measures and prints."""

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
from gcahng.bench.progress import Progress
from gcahng.bench.system import ProductRate, seconds
from gcahng.engine.free_memory import free_memory
from gcahng.engine.plan import edge_products, floor_products

# The authors' code at D = 512, L = 2: core-seconds of a step and of the graph network's forward, by batch, on cores
# whose matrix products run at 88 to 100 GF/s in fp32.
AUTHORS = {80: (6.4, 1.37), 128: (22.7, 4.38)}
# The reference's peak in fp32, bytes per ordered pair, channel and layer, as measured at D = 512.
REFERENCE_BYTES = 140


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, and the 20th and 80th percentile (nearest rank)."""
    ordered = sorted(times)
    low, high = (ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in (0.2, 0.8))
    return {"median": statistics.median(ordered), "p20": low, "p80": high}


def measure(sizes: Sequence[Case], variants: Sequence[Case], reps: int, peaks: bool) -> dict[str, Any]:
    """Measures variants (their impl, precision and memory) at each of these sizes, and the fp32 reference,
    interleaved.

    → {"rates": FLOP/s of matrix products, "rows": one dict a case and size; times in seconds, memory in bytes}. A row's
    "disagrees" says why a case has no ratios, or is None.
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
    with Progress(len(sizes) * (count * (reps + 1 + peaks) + 1)) as progress:
        for group in cases:
            rows += _measure_size(group, reps, peaks, products, times, progress)
    rates = {key: products[key].flops / statistics.median(found) for key, found in times.items()}
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
    progress: Progress,
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
        for case in (*cases[rep % len(cases) :], *cases[: rep % len(cases)]):  # no case always follows the same one
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


def _disagreements(baseline: Case, others: list[Case], progress: Progress) -> dict[Case, str | None]:
    """By case, why it has no ratios (None: it agrees with the reference)."""
    found: dict[Case, str | None] = {baseline: None}
    if not _fits(baseline, 2 * REFERENCE_BYTES):
        needed, free = _needed(baseline, 2 * REFERENCE_BYTES), free_memory("cpu")
        reason = (
            f"cannot be checked: the reference in fp64 takes about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        )
        for _ in range(len(others) + 2):
            progress.done()
        return found | dict.fromkeys(others, reason)
    progress.doing(f"n = {baseline.batch}, the reference in fp64")
    agreement = Agreement(baseline)
    progress.done()
    progress.done()
    for case in others:
        progress.doing(f"n = {case.batch}, checking {case.name}")
        found[case] = agreement.problem(case)
        progress.done()
    return found


def _needed(case: Case, bytes_each: int) -> int:
    return bytes_each * case.batch**2 * case.dim * case.layers


def _fits(case: Case, bytes_each: int) -> bool:
    """Whether the reference's memory, so many bytes per ordered pair, channel and layer, is free (or nobody knows)."""
    free = free_memory("cpu")
    return free is None or _needed(case, bytes_each) <= free


def _authors_ratios(case: Case, step: float, forward: float) -> dict[str, float]:
    """Core-seconds of the authors' code over this case's, at the batch that is at most one sample smaller."""
    known = AUTHORS.get(case.batch) or AUTHORS.get(case.batch - 1)
    if known is None or (case.dim, case.layers) != (512, 2):
        return {}
    threads = torch.get_num_threads()
    return {"authors_step_ratio": known[0] / (step * threads), "authors_forward_ratio": known[1] / (forward * threads)}


def _add_share(row: dict[str, Any], rate: float) -> None:
    """The floor of a step: the products it cannot do without, at the measured rate, on n²/2 pairs."""
    replay = row["memory"] != "hidden"
    pairs = row["D"] ** 2 * row["n"] ** 2 / 2
    floor = 2 * floor_products(row["L"], replay) * pairs
    row["floor_flops"] = floor
    row["done_flops"] = 2 * edge_products(row["L"], row["memory"]) * pairs
    row["share_of_floor"] = None
    if row["disagrees"] is None and not row["case"].startswith("reference"):
        row["share_of_floor"] = floor / rate / row["step_s"]["median"]


def table(found: dict[str, Any]) -> str:
    """A Markdown table and what its columns mean."""
    lines = [
        "| n | case | up to θ, s | rest, s | step, s | peak, MB | step × | up to θ × | authors × | share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for row in found["rows"]:
        times = [_times(row[name]) for name in ("forward_s", "rest_s", "step_s")]
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        ratios = [row.get(name) for name in ("step_ratio", "forward_ratio", "authors_step_ratio")]
        cells = [f"{ratio:.2f}" if ratio else "–" for ratio in ratios]
        share = f"{100 * row['share_of_floor']:.0f} %" if row["share_of_floor"] else "–"
        lines.append(f"| {' | '.join([str(row['n']), row['case'], *times, peak, *cells, share])} |")
        if row["disagrees"]:
            notes.append(f"No ratio for {row['case']} at n = {row['n']}: {row['disagrees']}.")
    rates = "; ".join(f"{name}: {rate / 1e9:.0f} GF/s" for name, rate in found["rates"].items())
    return "\n".join([*lines, "", *notes, *_legend(found["rows"]), f"Matrix products measured in this run: {rates}."])


def _times(found: dict[str, float]) -> str:
    digits = 4 if found["median"] < 0.1 else 3
    return f"{found['median']:.{digits}f} ({found['p20']:.{digits}f}–{found['p80']:.{digits}f})"


def _legend(rows: list[dict[str, Any]]) -> list[str]:
    threads = torch.get_num_threads()
    lines = [
        "Median (20th–80th percentile). up to θ: the graph network in training mode without a gradient, θ formed by",
        "tile and dropped (the reference holds it). step: loss, backward and generator_step. rest: a step less two of",
        "the former; the engine forms a pass's gradients with its losses, so that loss.backward() alone would time",
        "next to nothing. ×: the fp32 reference's median over the case's.",
    ]
    if any("authors_step_ratio" in row for row in rows):
        lines.append(
            "authors ×: the authors' code, 6.4 core-seconds a step at n = 80 and 22.7 at n = 128 on cores whose "
            f"products run at 88–100 GF/s in fp32, over this case's seconds times {threads} thread(s)."
        )
    layers = sorted({row["L"] for row in rows})
    formulas = ", ".join(
        f"{floor_products(n, True) / 2:g} D² n² multiply-adds at L = {n} ({floor_products(n, False) / 2:g} hidden)"
        for n in layers
    )
    return [*lines, f"share: of the time that a step's products would take at the measured rate: {formulas}."]
