"""Comparisons with a derived tolerance, and memory that shows where it is read before it is written.

The rule is that a result's error against the truth in fp64 is at most twice plain PyTorch's at the same precision, and
a rounding. Rounding errors are as good as random, though, and every processor draws others: of two implementations that
are equally exact, one run may find either of them several times as far off as the other. So no single error of plain
PyTorch bounds another. What is compared are root mean squares over elements and draws, and peaks over many elements,
which hardly vary; and the bound is widened by what chance alone explains (`chance_ratio`): nothing, for many elements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# Called with the name of each comparison and the share of the allowed error that it uses; it fails above 1.
observers: list[Callable[[str, float], None]] = []

# The largest of some 16,000 normally distributed errors is four times their root mean square.
_PEAK = 4.0


@functools.cache
def chance_ratio(draws: int, plain_draws: int, chance: float = 1e-6) -> float:
    """The ratio of root-mean-square errors that two equally exact implementations exceed by chance alone.

    A draw counts for two degrees of freedom, few as they are, because what the elements of one tensor are off by comes
    mostly from roundings that they share: over 24 draws of a training step, the squared error of half of the tensors
    had more than 2 in a deep network and more than 29 in a shallow one. The squared ratio then follows the F
    distribution with 2 · draws and 2 · plain_draws degrees of freedom, whose tail is a sum of binomial probabilities.

    Args:
        draws: Independent errors in the numerator, at least 1.
        plain_draws: Independent errors in the denominator, at least 1.
        chance: The probability that the ratio is exceeded.

    Returns:
        The ratio: 5.1 for 6 draws each, 1.7 for 40 each.
    """
    n = draws + plain_draws - 1
    binomial = [math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) for j in range(draws)]

    def tail(ratio: float) -> float:
        p = draws * ratio**2 / (draws * ratio**2 + plain_draws)
        logs = (binomial[j] + j * math.log(p) + (n - j) * math.log1p(-p) for j in range(draws))
        return sum(map(math.exp, logs))

    low, high = 1.0, 1e4
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if tail(middle) > chance else (low, middle)
    return high


def assert_within(error: float, allowed: float, name: str, what: str = "") -> None:
    """error ≤ allowed, or an AssertionError that says both; tells `observers`."""
    share = error / allowed if allowed > 0 else (0.0 if error == 0 else math.inf)
    for observer in observers:
        observer(name, share)
    assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}{what}"


def largest_allowed(errors: Sequence[Tensor]) -> float:
    """2 · max(peak, 4 · rms) of plain PyTorch's errors: what one element may be off by.

    Of many errors the peak is what counts. The peak of few may be small by luck, and their root mean square is not.

    Args:
        errors: plain - truth of any shape, in one draw or more.
    """
    peak = max(one.abs().max().item() for one in errors)
    return 2 * max(peak, _PEAK * math.sqrt(sum(one.square().mean().item() for one in errors) / len(errors)))


def assert_close_to_truth(
    actual: Tensor, plain: Tensor | Sequence[Tensor], truth: Tensor, name: str = "result"
) -> None:
    """Element by element and in the mean, `actual` is at most twice as far off as plain PyTorch, and a rounding.

    Each element: |actual - truth| ≤ 2 · max(peak, 4 · rms) + ½ eps |truth|, with the peak and the root mean square of
    plain PyTorch's errors over all elements and draws (`largest_allowed`).

    All elements: rms(actual - truth) ≤ max(2, chance) · rms(plain - truth) + ½ eps rms(truth). Two elements count for
    one degree of freedom, so that `chance_ratio` matters below some 50 elements only.

    In fp64 plain PyTorch is the truth itself: 8 · eps · max|truth| is allowed for sums in another order.

    Args:
        actual: What is tested.
        plain: Plain PyTorch's result in the same dtype from the same inputs; or several, from inputs moved by a
            rounding, of which a small result needs some.
        truth: The result in fp64 from the same (rounded) inputs.
        name: What an error calls the result.

    Raises:
        AssertionError: Values are too far off, with the worst of them and where it is; or shapes or dtypes differ, or
            values are not finite.
    """
    plain = [plain] if isinstance(plain, Tensor) else list(plain)
    for one in plain:
        assert actual.shape == one.shape == truth.shape, f"{name}: shapes {actual.shape}, {one.shape}, {truth.shape}"
        assert actual.dtype == one.dtype, f"{name}: dtype {actual.dtype} where plain PyTorch has {one.dtype}"
    assert truth.dtype == torch.float64, f"{name}: the truth has dtype {truth.dtype}, not float64"
    if actual.numel() == 0:
        return
    bad = int((~actual.isfinite()).sum())
    assert bad == 0, f"{name}: {bad} of {actual.numel()} values are not finite"
    truth = truth.to(actual.device)
    rounding = torch.finfo(actual.dtype).eps / 2
    error = (actual.double() - truth).abs()
    errors = [(one.double() - truth).abs() for one in plain]
    spread = math.sqrt(sum(one.square().mean().item() for one in errors) / len(errors))
    in_order = 16 * rounding * truth.abs().max() if actual.dtype == torch.float64 else 0.0
    allowed = largest_allowed(errors) + rounding * truth.abs() + in_order
    at = int((error / allowed.clamp_min(1e-300)).flatten().argmax())
    where = tuple(int(k) for k in torch.unravel_index(torch.tensor(at), actual.shape))
    beyond = int((error > allowed).sum())
    what = f" where {actual[where].item():.9g} should be {truth[where].item():.9g}"
    what += f" ({beyond} of {actual.numel()} values are too far off)"
    assert_within(error[where].item(), allowed[where].item(), f"{name}{list(where)}", what)

    count = min(math.ceil(actual.numel() / 4), 100)  # more of them leave nothing to chance
    ratio = max(2.0, chance_ratio(count, count * len(plain)))
    scale = truth.square().mean().sqrt().item()
    allowed_mean = ratio * spread + rounding * scale + float(in_order)
    assert_within(error.square().mean().sqrt().item(), allowed_mean, f"{name} in the mean")


def assert_as_exact_as_plain(
    actual: Mapping[str, Sequence[float]],
    plain: Mapping[str, Sequence[float]],
    rounding: Mapping[str, float],
    *,
    factor: float = 2.0,
) -> None:
    """Over several draws of one problem, no tensor is farther off than chance explains, and all together are at most
    twice as far off as plain PyTorch's.

    Each tensor: rms over draws ≤ chance_ratio · rms of plain PyTorch's + a rounding. All tensors: the geometric mean of
    these ratios is at most `factor`. It hardly depends on chance: many tensors have luck of their own.

    Args:
        actual: For every tensor its error in each draw, relative to the tensor's size.
        plain: Plain PyTorch's, of the same tensors.
        rounding: What every tensor may be off by in any case, relative to its size.
        factor: What the ratios may be in the mean.

    Raises:
        AssertionError: A tensor is too far off, or all of them together, or they are not the same tensors.
    """
    assert actual.keys() == plain.keys() and actual, f"has {actual.keys() ^ plain.keys()} of its own"
    logs = []
    for name, errors in actual.items():
        ours, theirs = (math.sqrt(sum(x * x for x in draws) / len(draws)) for draws in (errors, plain[name]))
        ratio = chance_ratio(len(errors), len(plain[name]))
        assert_within(ours, ratio * theirs + rounding[name], name, " of its size")
        logs.append(math.log((ours + rounding[name]) / (theirs + rounding[name])))
    assert_within(math.exp(sum(logs) / len(logs)), factor, "all tensors together", " times plain PyTorch's error")


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
