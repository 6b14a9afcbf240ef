"""What a run recorded in metrics.jsonl, read back for curves."""

from __future__ import annotations

import json
import math
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


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in the order of the file.

    Raises:
        UserError: the file cannot be read, or a line is no record.
    """
    try:
        text = regular_file(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"metrics_jsonl is {path}, which cannot be read: {error.strerror}") from None
    *lines, last = text.split("\n")
    records = []
    # Whole lines end with a line break. What follows the last one is empty, or a line that was cut short.
    for number, line in enumerate([*lines, last] if _is_record(last) else lines, start=1):
        if not line.strip():
            continue
        if not _is_record(line):
            raise UserError(
                f"metrics_jsonl is {path}, whose line {number} is no record; it must be an object with "
                '"step" and "kind"'
            )
        records.append(json.loads(line))
    return records


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record


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
    recalls = sorted((n for n in names if n.startswith("recall@")), key=lambda n: int(n.removeprefix("recall@")))
    return [name for name in ("map@r", "r_precision") if name in names] + recalls


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 values before it, without those that are not finite."""
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - window + 1) : i + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means
