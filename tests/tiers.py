"""Which of a test's cases run by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def few(cases: Sequence[Any], count: int = 1) -> list[Any]:
    """The first `count` cases are in the default tier, the others in the thorough one.

    Args:
        cases: values of one parameter, or pytest.param with those of several.
        count: how many are in the default tier.
    """
    thorough = pytest.mark.thorough
    others = (
        case if hasattr(case, "values") and hasattr(case, "marks") else pytest.param(case) for case in cases[count:]
    )
    return [*cases[:count], *(pytest.param(*case.values, marks=[*case.marks, thorough], id=case.id) for case in others)]


def paired(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Pairs of two parameters' values. By default those of the first one's first value; each other value is tried with
    one of the second's in the thorough tier, by turns, and with the others in the slow one."""
    pairs = []
    for a, one in enumerate(first):
        for b, other in enumerate(second):
            mark = [] if not a else [pytest.mark.thorough if a % len(second) == b else pytest.mark.slow]
            pairs.append(pytest.param(one, other, marks=mark))
    return pairs
