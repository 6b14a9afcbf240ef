"""Every run of these tests sees a small part of glyphs, and several look at one finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _small_data(runs_see_small_data: None) -> None: ...


@pytest.fixture
def run(finished_run: tuple[Path, dict[str, Any]]) -> str:
    """The folder of a finished run."""
    return str(finished_run[0])
