"""The comparison itself: it accepts what rounding explains, and nothing else."""

from __future__ import annotations

import pytest
import torch

from gcahng.errors import UserError
from gcahng.testing import assert_close_to_truth, nan_poisoned, peak_memory, seeded


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
