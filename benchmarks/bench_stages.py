"""Times each stage of the engine on one tile, in plain torch and in C++, including the matrix products of the stage.

    python -m pytest benchmarks/bench_stages.py --benchmark-json=raw.json
    python benchmarks/bench_stages.py raw.json stages.json     # the medians, as in benchmarks/results

Before anything is timed, C++ is compared with plain torch in fp64:
|C++ - truth| ≤ 2 · max|torch - truth| + one rounding of the products' dtype. A stage that fails is not timed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _stage_tile import STAGES, Size, Tile
from torch import Tensor

from gcahng.bench.system import settings
from gcahng.dispatch import available
from gcahng.engine.schedule import default_tile_rows
from gcahng.testing.compare import largest_allowed

DIM, CLASSES, VIEWS = 256, 40, 3
TILE_ROWS = default_tile_rows(DIM, torch.float32)
PRECISIONS = {"fp32": (torch.float32, torch.float32), "bf16": (torch.float32, torch.bfloat16)}


def tile_of(impl: str, accumulate: torch.dtype, compute: torch.dtype) -> Tile:
    return Tile(Size(CLASSES, VIEWS, DIM, accumulate, compute, tile_rows=TILE_ROWS), impl)


def results(impl: str, stage: str, accumulate: torch.dtype, compute: torch.dtype) -> list[Tensor]:
    return [x.double().clone() for x in tile_of(impl, accumulate, compute).prepare(stage)()]


def check(precision: str, stage: str) -> None:
    """Raise AssertionError if C++ is not as close to fp64 as plain torch is."""
    truth = results("torch", stage, torch.float64, torch.float64)
    plain, actual = (results(impl, stage, *PRECISIONS[precision]) for impl in ("torch", "cpp"))
    rounding = torch.finfo(PRECISIONS[precision][1]).eps / 2
    for place, (value, other, exact) in enumerate(zip(actual, plain, truth, strict=True)):
        allowed = largest_allowed([other - exact]) + rounding * exact.abs().max().item()
        error = (value - exact).abs().max().item()
        assert error <= allowed, f"{stage}, result {place}, is off by {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_stage(stage: str, precision: str, impl: str, benchmark: Any) -> None:
    reason = available("cpp", "cpu")
    assert reason is None, reason
    check(precision, stage)
    tile = tile_of(impl, *PRECISIONS[precision])
    call = tile.prepare(stage)
    call()
    benchmark.group = f"{stage} {precision}"
    benchmark.extra_info["edges"] = tile.tile.rows
    benchmark(call)


def medians(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each stage and precision, in seconds, from what pytest-benchmark wrote."""
    times = {tuple(b["params"][k] for k in ("stage", "precision", "impl")): b["stats"] for b in raw["benchmarks"]}
    measured = {key[:2] for key in times}
    return [
        {"stage": stage, "precision": precision}
        | {impl: times[stage, precision, impl]["median"] for impl in ("torch", "cpp")}
        for stage in STAGES
        for precision in PRECISIONS
        if (stage, precision) in measured
    ]


def main(raw: str, out: str) -> None:
    result = {"settings": settings(), "rows": medians(json.loads(Path(raw).read_text(encoding="utf-8")))}
    Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python benchmarks/bench_stages.py RAW.json OUT.json")
    main(*sys.argv[1:])
