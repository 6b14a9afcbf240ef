"""Measures and prints the peak memory of a training step by batch and mode, for `gcahng bench memory`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from gcahng.bench.cases import PRECISIONS, Case
from gcahng.bench.peak import Peak, measure_peak
from gcahng.bench.progress import ProgressBar
from gcahng.engine.fits import check_step
from gcahng.engine.plan import StepSize, expected_bytes
from gcahng.errors import UserError


def plan_size(case: Case) -> StepSize:
    """The sizes of a case, in the form that the planner takes."""
    accumulate = torch.float64 if case.precision == "fp64" else torch.float32
    sizes = (case.batch, case.dim, case.layers, case.views, case.classes)
    return StepSize(
        *sizes,
        PRECISIONS[case.precision],
        accumulate,
        case.edge_dtype or accumulate,
        case.symmetric,
        case.implementation,
        torch.device(case.device).type,
    )


def measure(cases: Sequence[Case], extra: Sequence[tuple[Case, Case]], steps: int) -> list[dict[str, Any]]:
    """Measure the peak memory of each case.

    Args:
        cases: what to measure.
        extra: pairs of cases that differ in their number of classes only. The row of the first one says by how much its
            phase 3 exceeds that of the second one.
        steps: number of steps in each process.

    Returns:
        One row for each case, with memory in bytes.
    """
    peaks: dict[Case, Peak] = {}
    failed: dict[Case, str] = {}
    rows = []
    wanted = [*cases, *(case for pair in extra for case in pair)]
    with ProgressBar(len(dict.fromkeys(wanted))) as progress:
        for case in dict.fromkeys(wanted):
            progress.doing(f"n = {case.batch}, M = {case.classes}, {case.name}")
            try:
                check_step(plan_size(case), case.device, case.memory)
                peaks[case] = measure_peak(case, steps)
            except UserError as error:  # the other cases are still measured
                failed[case] = str(error)
            progress.done()
    for case in dict.fromkeys([*cases, *(pair[0] for pair in extra)]):
        row = _row(case, peaks.get(case)) | {"failed": failed.get(case)}
        for many, few in extra:
            if case == many and many in peaks and few in peaks:
                row["phase3_extra"] = _difference(peaks[many].phase3, peaks[few].phase3)
                row["all_logits"] = many.batch**2 // many.views * many.classes * 4
        rows.append(row)
    _add_growth(rows)
    return rows


def _row(case: Case, peak: Peak | None) -> dict[str, Any]:
    sizes = {"n": case.batch, "D": case.dim, "L": case.layers, "K": case.views, "M": case.classes, "case": case.name}
    memory = dict.fromkeys(Peak._fields) if peak is None else peak._asdict()
    expected = None if case.implementation == "reference" else expected_bytes(plan_size(case), case.memory)
    per_pair = None if peak is None else peak.peak / case.batch**2
    return sizes | memory | {"expected": expected, "per_pair": per_pair, "growth": None}


def _difference(many: int | None, few: int | None) -> int | None:
    return None if many is None or few is None else many - few


def _add_growth(rows: list[dict[str, Any]]) -> None:
    """Add the exponent of n with which the peak grew since the previous batch of the same case."""
    last: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["case"], row["M"])
        before = last.get(key)
        if before and row["peak"] and row["n"] > before["n"]:
            row["growth"] = math.log(row["peak"] / before["peak"]) / math.log(row["n"] / before["n"])
        if row["peak"]:
            last[key] = row


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, and the meaning of its columns."""
    lines = [
        "| n | M | case | peak, MB | expected, MB | kB per n² | growth | phase 1, MB | phase 3, MB | over plain, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for row in rows:
        per_pair = "–" if row["per_pair"] is None else f"{row['per_pair'] / 1e3:.2f}"
        growth = "–" if row["growth"] is None else f"n^{row['growth']:.2f}"
        cells = [str(row["n"]), str(row["M"]), row["case"], _megabytes(row["peak"]), _megabytes(row["expected"])]
        cells += [per_pair, growth, *(_megabytes(row[name]) for name in ("phase1", "phase3", "resident"))]
        lines.append(f"| {' | '.join(cells)} |")
        if row["failed"]:
            notes.append(f"No result for {row['case']} at n = {row['n']}: {row['failed']}.")
        if row.get("phase3_extra") is not None:
            notes.append(
                f"Phase 3 at n = {row['n']} with M = {row['M']:,}, {row['case']}: {_megabytes(row['phase3_extra'])} MB "
                f"more than with the fewest classes; the logits of all negatives would take "
                f"{_megabytes(row['all_logits'])} MB."
            )
    legend = [
        "peak: the high-water mark of a fresh process, minus its resident size after one warm-up step at n = 2 K, when",
        "freed memory was returned and every weight has a gradient. over plain: the same, minus the resident size with",
        "what the allocator kept. growth: the exponent of n since the previous batch of the same case. expected: the",
        "estimate of gcahng plan.",
    ]
    return "\n".join([*lines, "", *notes, *legend])


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{max(0, count) / 1e6:.0f}"
