"""gcahng.ops.channel_mix: forward, backward and both, for every implementation that is available here.

    python -m pytest benchmarks/bench_channel_mix.py

Each is checked against the reference in float64 before it is timed; one that fails is not timed. There is no matrix
product in it: memory bounds it. GB/s counts the bytes that must move: θ is read and the negatives written (forward); θ
and their gradient are read, and the gradient of θ is written (backward). peak_MB is what the call held beyond its
inputs.
"""

from __future__ import annotations

import pytest
import torch
from op_timing import Case, cases, near, time_call
from torch import Tensor

from gcahng.ops import channel_mix
from gcahng.testing import seeded

SIZES = [(32, 3, 128), (43, 3, 512)]  # classes, samples a class, channels


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, coefficients, draws."""
    classes, views, dim = case.size
    n, options = classes * views, {"dtype": dtype, "device": case.device}
    theta = torch.sigmoid(seeded(n, n, dim, seed=2, **options))
    return seeded(n, dim, seed=1, **options), theta, torch.sigmoid(seeded(views, views - 1, seed=3, **options))


def run(z: Tensor, theta: Tensor, draws: Tensor, impl: str) -> Tensor:
    """The negatives."""
    return channel_mix(z, theta, num_per_class=draws.shape[0], pull=0.6, draws=draws, impl=impl)


def check(case: Case) -> None:
    """On a batch of four classes."""
    small = case._replace(size=(4, *case.size[1:]))

    def outputs(impl: str, dtype: torch.dtype) -> list[Tensor]:
        z, theta, draws = inputs_of(small)
        z, theta = (x.to(dtype).requires_grad_() for x in (z, theta))
        negatives = run(z, theta, draws.to(dtype), impl)
        upstream = seeded(*negatives.shape, seed=4, device=case.device).to(dtype)
        return [negatives.detach(), *torch.autograd.grad(negatives, (z, theta), upstream)]

    truth, plain = (outputs("reference", dtype) for dtype in (torch.float64, torch.float32))
    assert near(outputs(case.impl, torch.float32), plain, truth), "not as near as plain PyTorch"


@pytest.mark.parametrize("case", cases(SIZES, ("fp32",)), ids=str)
def test_channel_mix(case: Case, benchmark) -> None:
    classes, views, dim = case.size
    benchmark.group = f"channel_mix {case.direction} C={classes} K={views} D={dim} {case.precision} on {case.device}"
    check(case)
    z, theta, draws = inputs_of(case)
    inputs = [z.requires_grad_(), theta.requires_grad_()]
    upstream = seeded(views, classes, classes, dim, seed=4, device=case.device)
    seconds = time_call(benchmark, case, lambda: run(*inputs, draws, case.impl), inputs, upstream)
    if seconds is not None:
        coefficients, negatives = (classes * views) ** 2 * dim * 4, views * classes**2 * dim * 4
        moved = {"forward": coefficients + negatives, "backward": 2 * coefficients + negatives}
        moved["both"] = moved["forward"] + moved["backward"]
        benchmark.extra_info["GB/s"] = round(moved[case.direction] / seconds / 1e9, 2)
