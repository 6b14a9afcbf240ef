"""The notebook under examples/ runs from its first cell to its last, and holds no outputs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "first_minutes.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_it_holds_no_outputs() -> None:
    assert cells("markdown") and cells("code")
    assert not [cell for cell in cells("code") if cell["outputs"] or cell["execution_count"] is not None]


@pytest.mark.processes
def test_it_runs(tmp_path: Path) -> None:
    """Its cells are plain Python, so that they run without Jupyter."""
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells("code")), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr
    for name in ("recall@1", "map@r"):
        before, after = map(float, re.search(rf"{name}: ([\d.]+) before, ([\d.]+) after", done.stdout).groups())
        assert after > before + 10, done.stdout
    distances = re.findall(r"^ *([\d.]+)  (.*)$", done.stdout, re.MULTILINE)
    shown = {meaning: float(distance) for distance, meaning in distances}
    assert shown["generated negatives, on average"] < shown["real negatives, on average"]
    assert (tmp_path / "retrieved.png").stat().st_size > 10_000
