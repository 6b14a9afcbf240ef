"""Hostile inputs are taken rightly or refused in one line: some of each group in the tier of
processes, and over a thousand in the slow one.

They run in a process of their own, from which each case is forked: this one has computed already.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")
QUICK = ("arguments", "calls", "configurations", "images", "run_files", "states", "trees", "vectors")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits, forks and /proc are Linux's")


def hostile(*options: str) -> str:
    """What a run of cases prints: a table, and each fault with the command that repeats it."""
    done = subprocess.run([sys.executable, str(RUN), *options], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert re.search(r"^\d+ cases, \d+ faults, ", done.stdout, re.MULTILINE), done.stderr[-3000:]
    return done.stdout


def counts(printed: str) -> tuple[int, int]:
    found = re.search(r"^(\d+) cases, (\d+) faults, ", printed, re.MULTILINE)
    assert found is not None
    return int(found[1]), int(found[2])


@pytest.mark.processes
def test_a_few() -> None:
    cases, faults = counts(hostile("--cases", "40", "--seed", "1", "--only", *QUICK))
    assert cases >= 35 and faults == 0


@pytest.mark.slow
def test_more_than_a_thousand() -> None:
    cases, faults = counts(hostile("--cases", "1200"))
    assert cases >= 1000 and faults == 0


@pytest.mark.processes
def test_each_kind_of_fault_is_seen() -> None:
    """Where a case commits it."""
    printed = hostile("--plant")
    kinds = re.findall(r"^([a-z-]+): .*\n  tried: .*\n  .* --only ([a-z-]+) ", printed, re.MULTILINE)
    assert len(kinds) == 8 and all(kind == planted for kind, planted in kinds)
