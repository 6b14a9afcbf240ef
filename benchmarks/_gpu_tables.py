"""What was measured, in Markdown, with one table for each section."""

from __future__ import annotations

from typing import Any

from _gpu_ceilings import best
from _gpu_derived import stage_seconds, step_seconds
from _gpu_stages import add_shares
from _gpu_step import add_ratios

from gcahng.dispatch import AUTO

Rows = list[dict[str, Any]]
CLEARLY = 0.95  # of the other's time
_AS_STAGES = {"auto": "cuda+triton", "cuda": "cuda", "triton": "triton", "torch": "torch"}


def add_derived(found: dict[str, Any]) -> None:
    """Add the ratios and shares that need rows of several items."""
    rates, copy = best(found["ceilings"])
    add_shares(found["stages"], rates, copy)
    groups: dict[int, Rows] = {}
    for row in found["step"]:
        groups.setdefault(row["item"], []).append(row)
    for rows in groups.values():
        add_ratios(rows, rates)
    for row in found["step"]:
        row["derived_s"] = step_seconds(row)
    for row in found["stages"]:
        row["derived_s"] = stage_seconds(row)


def report(found: dict[str, Any]) -> str:
    """All tables in Markdown."""
    title = " (dry run on the CPU: the numbers mean nothing)" if found["dry"] else ""
    parts = [_settings(found)]
    for name, section in (("What the card can do", "ceilings"), ("Largest batch by the planner", "plan")):
        parts.append(f"## {name}{title}\n\n{_TABLES[section](found[section])}")
    parts.append(f"## Whole steps{title}\n\n{_steps(found['step'])}")
    parts.append(f"## Stages, products included{title}\n\n{_stages(found['stages'], 'stage')}")
    parts.append(f"## Triton's products in several configurations{title}\n\n{_products(found.get('products', []))}")
    parts.append(f"## Row-wise ops alone{title}\n\n{_stages(found['stages'], 'op')}")
    if (advice := best_auto(found["step"], found["stages"])) is not None:
        parts.append(f"## What auto should take here{title}\n\n    export {AUTO}={advice}")
    if found["dropped"]:
        parts.append(f"Dropped for want of time: {'; '.join(found['dropped'])}.")
    parts += [f"Failed: {x['item']}, at {x['case'] or 'its start'}: {x['reason']}" for x in found["failed"]]
    return "\n\n".join(parts)


def best_auto(steps: Rows, stages: Rows) -> str | None:
    """The value of GCAHNG_AUTO that the measurements speak for (see gcahng.dispatch).

    It begins with the implementation whose whole step in bf16 is fastest, at the largest n at which all were measured.
    It adds each op that the other implementation is clearly faster at, in every stage that has it. None: there are too
    few measurements.
    """
    times: dict[tuple[int, int], dict[str, float]] = {}
    for row in steps:
        sound = row["step_s"] is not None and row["disagrees"] is None and not row["graph"]
        if sound and row["precision"] == "bf16" and row["impl"] in _AS_STAGES:
            times.setdefault((row["n"], row["L"]), {})[_AS_STAGES[row["impl"]]] = row["step_s"]["median"]
    compared = [size for size, found in times.items() if len(found) > 1]
    if not compared:
        return None
    found = times[max(compared)]
    base = min(found, key=found.__getitem__)
    if base == "torch":
        return base
    other = "cuda" if base == "triton" else "triton"
    faster: dict[str, list[bool]] = {}
    for row in stages:
        if row["kind"] == "op" and (over := row["triton_over_cuda"]) is not None:
            faster.setdefault(row["name"], []).append((over if other == "triton" else 1 / over) < CLEARLY)
    return ",".join([base, *(f"{name}={other}" for name, gains in faster.items() if all(gains))])


def _settings(found: dict[str, Any]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in found["settings"].items())]
    lines += [f"{name} is not available: {reason}" for name, reason in found.get("unavailable", {}).items()]
    if build := found.get("build"):
        lines += [f"build: {build['seconds']:.0f} s, status {build['status']}", *build["left_out"]]
    if check := found.get("check"):
        lines += [f"check: {check['summary']} (status {check['status']})", *check["failed"]]
    return "\n".join(lines)


def _ceilings(rows: Rows) -> str:
    lines = ["| what | precision | rows | TFLOP/s or TB/s |", "|---|---|---:|---:|"]
    for row in rows:
        cells = [row.get("name", "copy, read and written"), row.get("precision", ""), str(row.get("rows", ""))]
        lines.append(_line([*cells, row["failed"] or f"{row['rate'] / 1e12:.4g}"]))
    return "\n".join(lines)


def _plan(rows: Rows) -> str:
    modes = list(rows[0]["largest"]) if rows else []
    lines = [_line(["L", "precision", "stages", *(f"n, {mode}" for mode in modes)]), f"|{'---|' * (3 + len(modes))}"]
    for row in rows:
        largest = ["none" if n is None else f"{n:,}" for n in row["largest"].values()]
        lines.append(_line([str(row["L"]), row["precision"], row["impl"], *largest]))
    note = f"Of {rows[0]['bytes'] / 1e9:.1f} GB, all of it free." if rows else ""
    return "\n".join([*lines, "", note])


def _steps(rows: Rows) -> str:
    baselines = list(dict.fromkeys(row["case"] for row in rows if row["impl"] == "reference"))
    head = ["n", "L", "case", "step, ms", "derived, ms", "host, ms", "peak, GB", "planned, GB", "share"]
    head += [f"× {name.removeprefix('reference ')}" for name in baselines]
    lines = [_line([*head, "checked at n"]), f"|---:|---:|---|{'---:|' * (len(head) - 2)}"]
    notes = []
    for row in rows:
        cells = [str(row["n"]), str(row["L"]), row["case"]]
        if row["failed"]:
            cells.append(row["failed"])
        else:
            cells.append(_spread(row["step_s"], 1e3))
        cells += [
            _seconds(row.get("derived_s"), 1e3),
            _spread(row["host_s"], 1e3, brief=True),
            _giga(row["peak_bytes"]),
            _giga(row["expected_bytes"]),
        ]
        ratios = row.get("ratios", {})
        cells.append(_percent(row.get("share_of_floor")))
        cells += [f"{ratios[name]:.2f}" if name in ratios else "–" for name in baselines]
        lines.append(_line([*cells, str(row["checked_at"])]))
        if row["disagrees"]:
            notes.append(f"No ratio for {row['case']} at n = {row['n']}, L = {row['L']}: {row['disagrees']}.")
    legend = (
        "Median (20th–80th percentile) of whole steps: loss, backward, generator_step. derived: by "
        "benchmarks/roofline.py, for an H100. host: the time after which the "
        "host was free again; if it is as long as the step, launches bound the step. peak: the most that torch's "
        "allocator held, weights and optimizers included; planned: without these. share: the time that the products "
        "which a step cannot do without take at the best rate measured, divided by the step's time. ×: the reference's "
        "median, measured in turns with the case, divided by the case's. checked at: the size at which the case was "
        "compared with the reference in fp64."
    )
    return "\n".join([*lines, "", *notes, legend])


def _stages(rows: Rows, kind: str) -> str:
    what = "op" if kind == "op" else "stage"
    head = [
        what,
        "precision",
        "impl",
        "µs",
        *(["derived, µs"] if kind == "stage" else []),
        "share",
        "TB/s" if kind == "op" else "TFLOP/s",
        "Triton / CUDA C++",
    ]
    lines = [_line(head), f"|---|---|---|{'---:|' * (len(head) - 3)}"]
    notes = []
    for row in (row for row in rows if row["kind"] == kind):
        times = row["time_s"]
        amount = row.get("bytes") if kind == "op" else row.get("flops")
        rate = f"{amount / times['median'] / 1e12:.3g}" if times and amount else "–"
        over = row.get("triton_over_cuda")
        name = row["name"] if row["name"] == row["stage"] else f"{row['name']} in {row['stage']}"
        cells = [name, row["precision"], row["impl"], row["failed"] or _spread(times, 1e6)]
        cells += [_seconds(row.get("derived_s"), 1e6)] if kind == "stage" else []
        lines.append(_line([*cells, _percent(row.get("share")), rate, f"{over:.2f}" if over else "–"]))
        if row["disagrees"]:
            notes.append(f"No share for {row['name']}, {row['impl']} {row['precision']}: {row['disagrees']}.")
    legend = (
        "share: bytes that a call must move at the rate of a copy, over its time."
        if kind == "op"
        else "share: the time of the stage's products at the best rate measured, and of its row-wise ops' bytes at the "
        "rate of a copy, divided by its time. A stage whose products do their neighbors' work moves fewer bytes."
    )
    sizes = sorted({(row["rows"], row["D"]) for row in rows})
    tiles = "; ".join(f"{count:,} edges, D = {dim}" for count, dim in sizes)
    return "\n".join([*lines, "", *notes, f"{legend} Launching is not counted. One tile: {tiles}."])


def _products(rows: Rows) -> str:
    lines = ["| stage | precision | configuration | µs | in use | fastest |", "|---|---|---|---:|---|---|"]
    notes = []
    for row in rows:
        same = [r for r in rows if (r["stage"], r["precision"]) == (row["stage"], row["precision"])]
        sound = [r["time_s"]["median"] for r in same if r["time_s"] and not r["disagrees"]]
        fastest = row["time_s"] and not row["disagrees"] and row["time_s"]["median"] == min(sound)
        cells = [row["stage"], row["precision"], row["config"], row["failed"] or _spread(row["time_s"], 1e6)]
        lines.append(_line([*cells, "yes" if row["chosen"] else "", "yes" if fastest else ""]))
        if row["disagrees"]:
            notes.append(f"{row['stage']} in {row['config']}: {row['disagrees']}.")
    return "\n".join([*lines, "", *notes, "kernels/configs.py holds the configuration in use."])


def _seconds(seconds: float | None, scale: float) -> str:
    return "–" if seconds is None else f"{seconds * scale:.4g}"


_TABLES = {"ceilings": _ceilings, "plan": _plan}


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(times: dict[str, float] | None, scale: float, brief: bool = False) -> str:
    if times is None:
        return "–"
    median, low, high = (f"{times[name] * scale:.4g}" for name in ("median", "p20", "p80"))
    return median if brief else f"{median} ({low}–{high})"


def _giga(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e9:.3g}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"
