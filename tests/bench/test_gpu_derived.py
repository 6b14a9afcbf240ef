"""What benchmarks/gpu.py prints beside what it measures."""

from __future__ import annotations

import _gpu_derived
import _gpu_products
import pytest
import roofline
import torch
from _gpu_tables import report
from _stage_tile import STAGES
from gpu_cases import empty, nothing

from gcahng.availability import available


def step_row(**changes: object) -> dict[str, object]:
    row = {"n": 1023, "D": 512, "K": 3, "L": 2, "impl": "auto", "precision": "bf16", "memory": "store", "graph": False}
    return row | {"narrow": False} | changes


def test_steps_are_the_rooflines() -> None:
    expected = roofline.total(roofline.Step(1023, 2, "bf16", True))
    assert _gpu_derived.step_seconds(step_row()) == expected.step
    assert _gpu_derived.step_seconds(step_row(graph=True)) == expected.seconds < expected.step
    assert _gpu_derived.step_seconds(step_row(narrow=True, precision="fp32")) == _gpu_derived.step_seconds(
        step_row(precision="fp32")
    )
    for impl, rows in (("auto", "cuda"), ("triton", "triton")):
        narrow = roofline.total(roofline.Step(1023, 2, "bf16", True, narrow=True, rows=rows))
        assert _gpu_derived.step_seconds(step_row(impl=impl, narrow=True)) == narrow.step < expected.step
    for other in ({"impl": "torch"}, {"precision": "tf32"}, {"D": 256}):
        assert _gpu_derived.step_seconds(step_row(**other)) is None


@pytest.mark.parametrize("impl", ["cuda", "cuda+triton", "triton"])
def test_every_stage_is_derived(impl: str) -> None:
    """What a step does to edges is in some stage or other, except for what is no stage."""
    assert set(STAGES) - set(_gpu_derived.STAGES) == {"cross_entropy", "similarity"}
    for stage in _gpu_derived.STAGES:
        row = {"kind": "stage", "stage": stage, "impl": impl, "precision": "bf16", "D": 512, "rows": 65_000}
        half = _gpu_derived.stage_seconds(row | {"rows": 32_500})
        assert half > 0 and _gpu_derived.stage_seconds(row) == pytest.approx(2 * half)
        assert _gpu_derived.stage_seconds(row | {"impl": "torch"}) is None
    known = {name for names in _gpu_derived.STAGES.values() for name in names}
    steps = [roofline.Step(255, 2, "bf16", epilogues) for epilogues in (False, True)]
    there = {kernel.stage for step in steps for kernel in roofline.kernels(step)}
    assert known <= there
    assert there - known == {
        "J_soft: products",
        "J_soft, J_sim",
        "mlp_in: product again",
    }


@pytest.mark.simulated
@pytest.mark.parametrize("stage", _gpu_products.OTHERS)
def test_products_are_measured_in_several_configurations(stage: str) -> None:
    assert available("triton", "cpu", torch.float32) is None
    item = {"stage": stage, "precision": "fp32", "dim": 16, "classes": 2, "views": 3, "device": "cpu", "seconds": 0.01}
    rows = _gpu_products.measure(item | {"without": []}, nothing)
    assert len(rows) == 2 and [row["chosen"] for row in rows] == [True, False]
    assert all(row["failed"] is None and row["disagrees"] is None and row["time_s"] for row in rows)
    text = report(empty() | {"products": rows})
    assert f"| {stage} | fp32 | {rows[0]['config']} |" in text and text.count("| yes |") >= 1
