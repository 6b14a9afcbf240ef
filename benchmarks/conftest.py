"""Settings that hold for every benchmark."""

from __future__ import annotations


def pytest_xdist_auto_num_workers() -> int:
    """One after the other, in this process: what runs beside a benchmark changes its times."""
    return 0
