"""Comparisons with a derived tolerance, and memory that shows where it is read before it is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def assert_close_to_truth(actual: Tensor, plain: Tensor, truth: Tensor, name: str = "result") -> None:
    """|actual - truth| ≤ 2 · max|plain - truth| + one rounding of the truth, for every element.

    Arguments
        actual: what is tested. plain: plain PyTorch's result in the same dtype from the same inputs.
        truth: the result in fp64 from the same (rounded) inputs.

    In fp64 plain PyTorch is the truth itself: 8 · eps · max|truth| is allowed for sums in another order.

    Errors: AssertionError with the largest excess and where it is; also for other shapes or dtypes, and for values that
    are not finite.
    """
    assert actual.shape == plain.shape == truth.shape, f"{name}: shapes {actual.shape}, {plain.shape}, {truth.shape}"
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype} where plain PyTorch has {plain.dtype}"
    assert truth.dtype == torch.float64, f"{name}: the truth has dtype {truth.dtype}, not float64"
    if actual.numel() == 0:
        return
    bad = int((~actual.isfinite()).sum())
    assert bad == 0, f"{name}: {bad} of {actual.numel()} values are not finite"
    truth = truth.to(actual.device)
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - truth).abs()
    allowed = 2 * (plain.double() - truth).abs().max() + eps / 2 * truth.abs()
    if actual.dtype == torch.float64:
        allowed = allowed + 8 * eps * truth.abs().max()
    excess = error - allowed
    if bool((excess > 0).any()):
        at = int(excess.flatten().argmax())
        where = tuple(int(k) for k in torch.unravel_index(torch.tensor(at), actual.shape))
        raise AssertionError(
            f"{name}{list(where)}: {actual[where].item():.9g} where the truth is {truth[where].item():.9g}; "
            f"off by {error[where].item():.3g}, allowed {allowed[where].item():.3g} "
            f"({int((excess > 0).sum())} of {actual.numel()} values are too far off)"
        )


@contextmanager
def nan_poisoned() -> Iterator[None]:
    """Inside it, torch.empty and its kin (those that C++ calls, too) come filled with NaN."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]
