"""Hostile inputs, made from a seed, and what the library does with them. `run.py` says how to run more of them."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
for _folder in (TESTS, TESTS / "data"):  # killed_runs and trees, which tests of runs and of data sets use too
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))
