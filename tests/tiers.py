"""Which of a test's cases run by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def few(cases: Sequence[Any], count: int = 1) -> list[Any]:
    """The first `count` cases are in the default tier, the others in the thorough one."""
    return [
        *cases[:count],
        *(
            pytest.param(*(case if type(case) is tuple else (case,)), marks=pytest.mark.thorough)
            for case in cases[count:]
        ),
    ]
