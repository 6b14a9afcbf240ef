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
    """Pairs of two parameters' values. The first pair is in the default tier. In the thorough one are the first value's
    others, and each further value with one of the second parameter's, by turns; the rest is in the slow tier."""
    pairs = []
    for a, one in enumerate(first):
        for b, other in enumerate(second):
            mark = pytest.mark.thorough if a == 0 or a % len(second) == b else pytest.mark.slow
            pairs.append(pytest.param(one, other, marks=[mark] if a or b else []))
    return pairs
