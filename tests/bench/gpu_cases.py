"""benchmarks/gpu.py as a module, and items for it that take no time."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import _gpu_items
import _gpu_step

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)

RATES, COPY = {"fp32": 1e12, "bf16": 2e12}, 1e12


def nothing(_: str) -> None:
    """Stands for the report of what is being worked on."""


def small_step(**changes: Any) -> dict[str, Any]:
    item = _gpu_items.step(12, 1, "fp32", _gpu_items.Sides(["cpp", "torch"]), dim=8, device="cpu")
    return item | {"seconds": 0.01, "without": []} | changes


def small_stage(stage: str, **changes: Any) -> dict[str, Any]:
    item = _gpu_items.stages(stage, "fp32", ["cpp", "torch"], ["cpp"], dim=8, classes=3, device="cpu")
    return item | {"seconds": 0.01, "without": []} | changes


def steps_of(item: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = _gpu_step.measure(item, nothing)
    _gpu_step.add_ratios(rows, RATES)
    return {row["case"]: row for row in rows}


def empty() -> dict[str, Any]:
    found = {"dry": True, "budget": 0.0, "settings": {}, "dropped": [], "failed": []}
    return found | {section: [] for section in gpu.SECTIONS}
