"""What a run recorded, as it is read back from metrics.jsonl for curves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gcahng.errors import UserError

# The losses of a run that get a curve, in this order, and what they are.
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
    """The records of a metrics.jsonl, in the order of the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"metrics_jsonl must be a readable file, {path}: {error.strerror}") from None
    *lines, last = text.split("\n")
    records = []
    # Whole lines end with a line break; what follows the last one was cut short, or is nothing.
    for number, line in enumerate([*lines, last] if _is_record(last) else lines, start=1):
        if not line.strip():
            continue
        if not _is_record(line):
            raise UserError(f'metrics_jsonl must hold objects with "step" and "kind", line {number} of {path} is none')
        records.append(json.loads(line))
    return records


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record


def series(records: list[dict[str, Any]], kind: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of one quantity by ascending step; the later of two records of a step."""
    values = {r["step"]: float(r[name]) for r in records if r["kind"] == kind and isinstance(r.get(name), (int, float))}
    return sorted(values.items())


def metric_names(records: list[dict[str, Any]], kind: str) -> list[str]:
    """The metrics of the records of a kind, "val" or "test": MAP@R and R-Precision, then Recall@K by K."""
    names = {name for record in records if record["kind"] == kind for name in record}
    recalls = sorted((n for n in names if n.startswith("recall@")), key=lambda n: int(n.removeprefix("recall@")))
    return [name for name in ("map@r", "r_precision") if name in names] + recalls


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to `window` - 1 before it; values that are not finite are left out of it."""
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - window + 1) : i + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means
