"""Runs killed by SIGKILL at any moment end with the bits of one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shared_files import FOLDER

import gcahng

SCRIPT = Path(__file__).parents[1] / "killed_runs.py"
ROOT = Path(gcahng.__file__).parents[1]


def killed(folder: Path, kills: int, seed: int) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(kills), str(seed)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", FOLDER: os.environ[FOLDER]},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.processes
def test_three_kills(tmp_path: Path) -> None:
    found = killed(tmp_path, kills=3, seed=0)
    assert found["kills"] == 3 and found["differences"] == []


@pytest.mark.slow
def test_forty_kills(tmp_path: Path) -> None:
    found = killed(tmp_path, kills=40, seed=1)
    assert found["kills"] == 40 and found["differences"] == []
