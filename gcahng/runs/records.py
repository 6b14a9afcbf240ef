"""What a run recorded in metrics.jsonl, read back for curves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gcahng.errors import UserError
from gcahng.files import regular_file

# The losses that get a curve, in this order, and what they mean.
LOSSES = {
    "loss": "what the embedding network minimizes",
    "J_m": "base loss on real samples",
    "J_syn": "synthetic negatives, weighted",
    "J_gce": "classes from graph nodes",
    "J_gen": "what the generator minimizes",
    "J_soft": "synthetic negatives keep their class",
    "J_sim": "synthetic negatives near the anchor",
    "J_div": "coefficients differ",
    "J_cls": "classifier of embeddings",
}


# What a record of kind "negatives" has, numbers all; and a list of numbers, the histogram.
NEGATIVES = ("synthetic", "synthetic_p10", "synthetic_p90", "real", "real_p10", "real_p90", "hardest_synthetic")
NEGATIVES += ("hardest_real", "positive", "nearer", "theta_mean", "theta_std")
HISTOGRAM = "theta_histogram"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in the order of the file.

    Raises:
        UserError: the file cannot be read, or a line is no record.
    """
    try:
        content = regular_file(path).read_bytes()
    except OSError as error:
        raise UserError(f"metrics_jsonl is {path}, which cannot be read: {error.strerror}") from None
    *lines, last = content.split(b"\n")
    records = []
    # Whole lines end with a line break. What follows the last one is empty, or a line that was cut short.
    for number, line in enumerate([*lines, last] if parse_record(last) else lines, start=1):
        if not line.strip():
            continue
        record = parse_record(line)
        if record is None:
            raise UserError(
                f"metrics_jsonl is {path}, whose line {number} is no record; it must be an object with "
                '"step" and "kind": restore the file, or remove that line'
            )
        records.append(record)
    return records


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object with a step in a line of a run's log; None if there is none."""
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or a number of thousands of digits
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    return None if any(isinstance(v, int) and abs(v) >= 2**63 for v in values.values()) else values


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line of metrics.jsonl; None if there is none."""
    record = parse_line(line)
    if record is None or not isinstance(record.get("kind"), str):
        return None
    if record["kind"] == "negatives" and not _has_negatives(record):
        return None
    return record


def _has_negatives(record: dict[str, Any]) -> bool:
    histogram = record.get(HISTOGRAM)
    if not isinstance(histogram, list) or not histogram:
        return False
    values = [*(record.get(name) for name in NEGATIVES), *histogram]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def series(records: list[dict[str, Any]], kind: str, name: str) -> list[tuple[int, float]]:
    """The values of one quantity over the steps.

    Args:
        records: of a run.
        kind: of the records that have it.
        name: of the quantity.

    Returns:
        (step, value) by ascending step; of two records of a step the later one counts.
    """
    values = {r["step"]: float(r[name]) for r in records if r["kind"] == kind and isinstance(r.get(name), (int, float))}
    return sorted(values.items())


def metric_names(records: list[dict[str, Any]], kind: str) -> list[str]:
    """The metrics in the records of a kind, "val" or "test": MAP@R and R-Precision, then Recall@K by K."""
    names = {name for record in records if record["kind"] == kind for name in record}
    recalls = [name for name in names if re.fullmatch("recall@[0-9]{1,9}", name)]
    recalls.sort(key=lambda n: int(n.removeprefix("recall@")))
    return [name for name in ("map@r", "r_precision") if name in names] + recalls


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 values before it, without those that are not finite."""
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - window + 1) : i + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means
