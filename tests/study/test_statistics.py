"""Means, intervals, paired tests and Holm's correction, against scipy and numbers made by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from gcahng.study.statistics import holm, paired, sign_flip, spread

METHOD, BASELINE = [0.72, 0.69, 0.75, 0.71, 0.68], [0.70, 0.66, 0.70, 0.72, 0.66]


def test_spread_by_hand() -> None:
    found = spread([1.0, 2.0, 3.0])
    # The 97.5 % quantile of t with 2 degrees of freedom is 4.302653, and the standard error is 1 / sqrt(3).
    assert found[:3] == (3, 2.0, 1.0)
    assert found.high == pytest.approx(2 + 4.302652729911275 / 3**0.5)
    assert found.low == pytest.approx(4 - found.high)
    assert spread([0.5]) == (1, 0.5, None, None, None)


def test_paired_t_is_scipys() -> None:
    found, wanted = paired(METHOD, BASELINE), stats.ttest_rel(METHOD, BASELINE)
    interval = wanted.confidence_interval(0.95)
    assert (found.t, found.p_t) == (wanted.statistic, wanted.pvalue)
    assert found.difference.low == pytest.approx(interval.low) and found.difference.high == pytest.approx(interval.high)
    assert found.difference.mean == pytest.approx(0.022)


def test_sign_flips_are_all_summed() -> None:
    differences = np.subtract(METHOD, BASELINE)
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=5)]
    assert sign_flip(differences) == sum(s >= abs(differences.sum()) - 1e-12 for s in sums) / 32
    wanted = stats.permutation_test((METHOD, BASELINE), lambda x, y: np.mean(x - y), permutation_type="samples")
    assert sign_flip(differences) == pytest.approx(wanted.pvalue)
    assert paired(METHOD, BASELINE).p_sign_flip == sign_flip(differences)


@pytest.mark.parametrize(
    ("differences", "p"), [([0.1, 0.2, 0.3], 0.25), ([0.3, -0.3], 1.0), ([1.0], 1.0), ([0.0, 0.0], 1.0)]
)
def test_sign_flips_by_hand(differences: list[float], p: float) -> None:
    assert sign_flip(differences) == p


def test_too_many_pairs_to_sum() -> None:
    assert sign_flip([1.0] * 20) == 2.0**-19 and sign_flip([1.0] * 21) is None


def test_where_there_is_no_t_test() -> None:
    assert paired([0.5], [0.4]).p_t is None
    equal = paired([0.5, 0.6, 0.7], [0.4, 0.5, 0.6])
    assert equal.t is None and equal.p_t is None and equal.p_sign_flip == 0.25


def test_holm_by_hand() -> None:
    # Ascending: 0.01 * 4, then 0.02 * 3, then 0.03 * 2 and 0.04, both raised to 0.06 before them.
    assert holm([0.04, 0.01, None, 0.03, 0.02]) == [0.06, 0.04, None, 0.06, 0.06]
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([None]) == [None]
