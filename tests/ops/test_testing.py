"""The comparison itself: it accepts what rounding explains, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from gcahng.errors import UserError
from gcahng.testing import assert_close_to_truth, nan_poisoned, peak_memory, seeded
from gcahng.testing.compare import assert_as_exact_as_plain, assert_within, chance_ratio


@pytest.fixture
def sums() -> tuple[torch.Tensor, torch.Tensor]:
    """A sum in fp32 and in fp64."""
    x = seeded(64, 33, seed=1)
    return x.sum(0), x.double().sum(0)


def test_accepts_what_is_as_good_as_plain_pytorch(sums) -> None:
    plain, truth = sums
    assert_close_to_truth(plain, plain, truth)
    assert_close_to_truth(truth.float(), plain, truth)


@pytest.mark.parametrize("factor", [1 + 1e-5, 1 - 1e-5, torch.nan, torch.inf, 0.0])
def test_refuses_one_wrong_value(sums, factor: float) -> None:
    plain, truth = sums
    largest = int(truth.abs().argmax())
    wrong = plain.clone()
    wrong[largest] *= factor
    with pytest.raises(AssertionError, match=rf"sum.*(\[{largest}\]|not finite)"):
        assert_close_to_truth(wrong, plain, truth, name="sum")


def test_refuses_other_shapes_and_dtypes(sums) -> None:
    plain, truth = sums
    with pytest.raises(AssertionError, match="shapes"):
        assert_close_to_truth(plain[:1], plain, truth)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close_to_truth(plain.bfloat16(), plain, truth)
    with pytest.raises(AssertionError, match="not float64"):
        assert_close_to_truth(plain, plain, truth.float())


def test_chance_is_that_of_the_f_distribution() -> None:
    for plain_draws in (1, 6, 20):  # two and 2m degrees of freedom: the tail is (1 + x/m)^-m
        wanted = math.sqrt(plain_draws * (10 ** (6 / plain_draws) - 1))
        assert chance_ratio(1, plain_draws) == pytest.approx(wanted, rel=1e-3)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(100_000, 12, generator=generator).square().mean(dim=1) for _ in range(2))
    exceeded = (ours / theirs).sqrt() > chance_ratio(6, 6, chance=1e-2)
    assert exceeded.double().mean().item() == pytest.approx(1e-2, rel=0.15)
    assert chance_ratio(100, 400) < 1.3


@pytest.mark.parametrize("count", [16, 33, 1000])
def test_accepts_a_sum_in_any_order(count: int) -> None:
    """Whatever the order: none of 20 sums is refused by four others."""
    x = seeded(count, 200, seed=2).t().contiguous()
    truth, generator = x.double().sum(0), torch.Generator().manual_seed(0)

    def in_some_order() -> torch.Tensor:
        return sum(x[torch.randperm(len(x), generator=generator)].unbind())

    for _ in range(20):
        actual, *plain = (in_some_order() for _ in range(5))
        assert_close_to_truth(actual, plain, truth)


def worse_sums(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums of 4,096 terms as they would be without runs, without compensation, or in another dtype."""
    naive, low = torch.zeros(x.shape[1]), torch.zeros(x.shape[1])
    for row in x:
        naive, low = naive + row, (low + row).bfloat16().float()
    one_bf16_run = torch.cat((x[:32].sum(0, keepdim=True).bfloat16().float(), x[32:])).sum(0)
    return {"one after the other": naive, "bf16": low, "one run of 32 in bf16": one_bf16_run}


def test_refuses_sums_that_lose_digits() -> None:
    x = seeded(4096, 33, seed=3).abs()
    x = x + 10  # terms of one sign: roundings add up
    truth, plain = x.double().sum(0), x.view(64, 64, -1).sum(0).sum(0)
    assert_close_to_truth(plain, plain, truth)
    for name, wrong in worse_sums(x).items():
        with pytest.raises(AssertionError, match=f"{name}.*off by"):
            assert_close_to_truth(wrong, plain, truth, name=name)


@pytest.mark.parametrize("ulp", [3, 100])
def test_refuses_a_few_roundings_in_the_mean(ulp: int) -> None:
    """Also where no single element is far off."""
    x = seeded(50, 33, seed=4)
    plain, truth = torch.exp(x), torch.exp(x.double())
    wrong = (truth * (1 + ulp * torch.finfo(torch.float32).eps)).float()
    with pytest.raises(AssertionError, match="exp.*off by"):
        assert_close_to_truth(wrong, plain, truth, name="exp")


def test_draws_are_compared_tensor_by_tensor_and_together() -> None:
    plain = {name: [1e-6, 2e-6, 1e-6, 3e-6, 1e-6, 2e-6] for name in "abcdefgh"}
    rounding = dict.fromkeys(plain, 6e-8)
    assert_as_exact_as_plain(plain, plain, rounding)
    assert_as_exact_as_plain(plain | {"c": [4 * x for x in plain["c"]]}, plain, rounding)  # chance explains it
    with pytest.raises(AssertionError, match="c: off by .* of its size"):
        assert_as_exact_as_plain(plain | {"c": [6 * x for x in plain["c"]]}, plain, rounding)
    with pytest.raises(AssertionError, match="all tensors together: off by 2.* times plain PyTorch's error"):
        assert_as_exact_as_plain({name: [2.2 * x for x in e] for name, e in plain.items()}, plain, rounding)
    with pytest.raises(AssertionError, match="has {'h'} of its own"):
        assert_as_exact_as_plain({name: e for name, e in plain.items() if name != "h"}, plain, rounding)


def test_observers_are_told_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float]] = []
    monkeypatch.setattr("gcahng.testing.compare.observers", [lambda name, share: told.append((name, share))])
    assert_within(1.0, 4.0, "x")
    with pytest.raises(AssertionError, match="y: off by 3, allowed 2"):
        assert_within(3.0, 2.0, "y")
    assert told == [("x", 0.25), ("y", 1.5)]


def test_empty_is_nan_inside_and_settings_come_back() -> None:
    with nan_poisoned():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert bool(torch.empty(3, dtype=dtype).isnan().all())
            assert bool(torch.ones(2, dtype=dtype).new_empty(3).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_inputs_are_seeded() -> None:
    first, again, other = (seeded(2, 3, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.bfloat16(), seeded(2, 3, 4, seed=0, dtype=torch.bfloat16))


def test_peak_memory_sees_what_is_freed_again() -> None:
    size = 64 << 20
    try:
        peak = peak_memory(lambda: torch.ones(size // 4).sum())
    except UserError as error:
        pytest.skip(str(error))
    assert 0.9 * size < peak < 1.3 * size
