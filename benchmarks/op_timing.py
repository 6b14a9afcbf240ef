"""What the benchmarks of the public ops share: directions, a check before timing, and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcahng import UserError, dispatch
from gcahng.testing import peak_memory

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DIRECTIONS = ("forward", "backward", "both")


class Case(NamedTuple):
    """What one row of the table measures."""

    device: str
    impl: str
    precision: str
    size: tuple[int, ...]
    direction: str

    def __str__(self) -> str:
        return "-".join([self.device, self.impl, self.precision, "x".join(map(str, self.size)), self.direction])


def cases(sizes: Sequence[tuple[int, ...]], precisions: Sequence[str]) -> list[Case]:
    """A case for each implementation that is available here, except Triton's interpreter."""
    return [
        Case(device, impl, precision, size, direction)
        for direction in DIRECTIONS
        for size in sizes
        for precision in precisions
        for device in DEVICES
        for impl in dispatch.NAMES
        if dispatch.available(impl, device) is None and not (impl == "triton" and device == "cpu")
    ]


def near(found: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> bool:
    """Whether each tensor is about as near to the float64 truth as plain PyTorch's.

    Its root mean square error may be twice as large, plus four roundings of the largest value.
    """
    for x, y, exact in zip(found, plain, truth, strict=True):
        error, allowed = ((z.double() - exact).square().mean().sqrt() for z in (x, y))
        if not error <= 2 * allowed + 4 * torch.finfo(x.dtype).eps * exact.abs().max():
            return False
    return True


def time_call(
    benchmark: Any, case: Case, run: Callable[[], Tensor], inputs: Sequence[Tensor], upstream: Tensor
) -> float | None:
    """Times a direction of an op with pytest-benchmark, and notes its peak memory.

    Args:
        benchmark: pytest-benchmark's fixture.
        case: what is timed.
        run: calls the op.
        inputs: what it is differentiated in.
        upstream: gradient of its result.

    Returns:
        Median seconds; None where pytest-benchmark times nothing (--benchmark-disable).
    """
    result = run()

    def forward() -> object:
        with torch.no_grad():
            return run()

    calls = {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(result, inputs, upstream, retain_graph=True),
        "both": lambda: torch.autograd.grad(run(), inputs, upstream),
    }

    def call() -> object:
        outputs = calls[case.direction]()
        if case.device == "cuda":
            torch.cuda.synchronize()
        return outputs

    call()
    try:
        benchmark.extra_info["peak_MB"] = round(peak_memory(call, case.device) / 1e6, 2)
    except UserError as error:
        benchmark.extra_info["peak_MB"] = str(error)
    benchmark(call)
    return None if benchmark.stats is None else benchmark.stats.stats.median
