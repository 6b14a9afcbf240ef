"""Every run of these tests sees a small part of glyphs."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _small_data(runs_see_small_data: None) -> None: ...
