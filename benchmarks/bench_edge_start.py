"""Edge start on one tile: forward, backward and both, for every implementation that is available here.

    python -m pytest benchmarks/bench_edge_start.py

Each is checked against the reference before it is timed; one that fails is not timed. The op does I·J·D products in the
forward and 2·I·J·D multiply-adds in the backward, so that memory bounds it. GB/s counts the bytes that must move: e
written once (forward), the upstream gradient read once (backward). peak_MB is what the call held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from gcahng import UserError
from gcahng.ops import edge_start
from gcahng.ops._implementations import NAMES, OPS, available
from gcahng.reference.edge_start import edge_start as reference
from gcahng.testing import EdgeStartInputs, assert_close_to_truth, edge_start_inputs, peak_memory

SIZES = [(48, 48, 512), (128, 128, 128), (129, 129, 512)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Case(NamedTuple):
    """What one row of the table measures."""

    device: str
    impl: str
    dtype: str
    size: tuple[int, int, int]
    direction: str


CASES = [
    Case(device, impl, dtype, size, direction)
    for direction in ("forward", "backward", "both")
    for size in SIZES
    for dtype in DTYPES
    for device in DEVICES
    for impl in NAMES
    if available(impl, device, "edge_start", DTYPES[dtype]) is None and not (impl == "triton" and device == "cpu")
]


def check(case: Case, inputs: EdgeStartInputs) -> None:
    """Raises AssertionError where output or gradients are not as close to the fp64 truth as plain PyTorch's."""

    def with_gradients(function: Callable, x_i: torch.Tensor, x_j: torch.Tensor, grad_e: torch.Tensor) -> list:
        e = function(x_i, x_j)
        return [e.detach(), *torch.autograd.grad(e, (x_i, x_j), grad_e)]

    actual = with_gradients(lambda a, b: edge_start(a, b, case.impl), *inputs)
    plain = with_gradients(reference, *inputs)
    wide = [x.detach().double() for x in inputs]
    truth = with_gradients(reference, wide[0].requires_grad_(), wide[1].requires_grad_(), wide[2])
    for name, *three in zip(("e", "dx_i", "dx_j"), actual, plain, truth, strict=True):
        assert_close_to_truth(*three, name=name)


def measured(case: Case, inputs: EdgeStartInputs) -> Callable[[], object]:
    """The call that is timed; on CUDA it waits for the device."""
    x_i, x_j, grad_e = inputs
    kept = edge_start(x_i, x_j, case.impl)

    def forward() -> object:
        with torch.no_grad():
            return edge_start(x_i, x_j, case.impl)

    def backward() -> object:
        return torch.autograd.grad(kept, (x_i, x_j), grad_e, retain_graph=True)

    def both() -> object:
        return torch.autograd.grad(edge_start(x_i, x_j, case.impl), (x_i, x_j), grad_e)

    call = {"forward": forward, "backward": backward, "both": both}[case.direction]
    if case.device == "cpu":
        return call

    def synchronised() -> object:
        result = call()
        torch.cuda.synchronize()
        return result

    return synchronised


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace(" ", ""))
def test_edge_start(case: Case, benchmark) -> None:
    assert case.impl in OPS["edge_start"].order(case.device)
    benchmark.group = f"edge_start {case.direction} {case.size} {case.dtype} on {case.device}"
    inputs = edge_start_inputs(*case.size, dtype=DTYPES[case.dtype], device=case.device)
    check(case, inputs)
    call = measured(case, inputs)
    call()
    try:
        benchmark.extra_info["peak_MB"] = round(peak_memory(call, case.device) / 1e6, 2)
    except UserError as error:
        benchmark.extra_info["peak_MB"] = str(error)
    benchmark(call)
    if benchmark.stats is not None:  # --benchmark-disable runs the call once and times nothing
        rows, columns, channels = case.size
        moved = rows * columns * channels * DTYPES[case.dtype].itemsize * (2 if case.direction == "both" else 1)
        benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 2)
