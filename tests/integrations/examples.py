"""Runs the scripts under examples/, and compares what they print with what the docs say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import gcahng

ROOT = Path(gcahng.__file__).parents[1]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
FEW = 3.0  # points of a result between processors, whose rounding differs
SHARE = 0.05


def printed(name: str) -> str:
    """What a script prints; it must end well."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / name], env=environment, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def documented(page: str) -> str:
    """The output that a page of docs/integrations shows: its only block of text."""
    (block,) = re.findall(
        r"^```text\n(.*?)^```$", (ROOT / "docs" / "integrations" / page).read_text("utf-8"), re.M | re.S
    )
    return block


def check_example(name: str, page: str) -> None:
    """Checks that a script ends with the lines that the page shows, with numbers that are close.

    Args:
        name: of the script under examples/.
        page: of the page under docs/integrations/.
    """
    said = documented(page).splitlines()
    found = printed(name).splitlines()[-len(said) :]
    assert [NUMBER.sub("#", line) for line in found] == [NUMBER.sub("#", line) for line in said], found
    for line, other in zip(found, said, strict=True):
        for number, expected in zip(NUMBER.findall(line), NUMBER.findall(other), strict=True):
            allowed = max(FEW if "." in expected else 0, SHARE * abs(float(expected)))
            assert abs(float(number) - float(expected)) <= allowed, f"{line!r}, and {page} says {other!r}"
