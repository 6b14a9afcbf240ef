"""Means, intervals and paired tests over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
MOST_FLIPPED = 20  # pairs, of which all 2^20 sign patterns are summed


class Spread(NamedTuple):
    """The values of several seeds.

    Attributes:
        count: how many values there are.
        mean: of the values.
        std: their sample standard deviation; None with one value.
        low: the lower end of the 95 % interval of the mean (Student's t); None with one value.
        high: its upper end.
    """

    count: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


class Paired(NamedTuple):
    """A method against its baseline, seed by seed.

    Attributes:
        difference: method minus baseline; its interval is that of the paired t test.
        t: the statistic of the paired t test; None where it does not exist.
        p_t: its two-sided p; None with one pair, or where all differences are equal.
        p_sign_flip: two-sided p of the exact sign-flip test: the share of all 2^n ways to exchange the two values of
            pairs whose mean difference is at least as far from 0. None with more than `MOST_FLIPPED` pairs.
    """

    difference: Spread
    t: float | None
    p_t: float | None
    p_sign_flip: float | None


def spread(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation and 95 % interval of at least one value."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Spread(len(array), mean, None, None, None)
    std = float(array.std(ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1)) * std / math.sqrt(len(array))
    return Spread(len(array), mean, std, mean - half, mean + half)


def paired(method: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare two methods whose values with the same seed stand at the same place.

    Args:
        method: a value for each seed.
        baseline: as many.
    """
    differences = np.asarray(method, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    found = spread(list(differences))
    t = p_t = None
    # Where all differences are equal but for rounding, the t test divides by nothing.
    if found.std is not None and found.std > 1e-12 * max(1.0, abs(found.mean)):
        result = stats.ttest_rel(method, baseline)
        t, p_t = float(result.statistic), float(result.pvalue)
    return Paired(found, t, p_t, sign_flip(list(differences)))


def sign_flip(differences: Sequence[float]) -> float | None:
    """Two-sided p of the exact sign-flip test, at least 2^(1 - n) for n differences that are not 0.

    Args:
        differences: of the pairs.

    Returns:
        None with more than `MOST_FLIPPED` differences.
    """
    array = np.asarray(differences, dtype=np.float64)
    if len(array) > MOST_FLIPPED:
        return None
    sums = np.zeros(1)
    for difference in array:
        sums = np.concatenate([sums + difference, sums - difference])
    # Sums that are equal in exact arithmetic count as equal.
    slack = 1e-12 * float(np.abs(array).sum())
    return float((np.abs(sums) >= abs(float(array.sum())) - slack).mean())


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction: p values that keep the chance of any false finding among all tests.

    Args:
        p_values: of the tests; None is no test, and stays.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[place] = largest
    return adjusted
