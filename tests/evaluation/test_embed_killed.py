"""gcahng embed, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictures import draw_folder

import gcahng

ROOT = Path(gcahng.__file__).parents[1]


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path: Path, small_config: Callable[..., Any]) -> None:
    """SIGKILL in the middle of a real run of the command; the second run ends with the bits of an undisturbed one."""
    from gcahng.train import fit

    run_folder = Path(fit(small_config(out=str(tmp_path / "run"), steps=2))["out"])
    folder = draw_folder(tmp_path / "pictures", classes=4, images=100)

    def command(out: str) -> list[str]:
        size = ["--data.resize", "128", "--data.image_size", "128", "--data.workers", "0", "--batch_size", "4"]
        return [
            sys.executable,
            "-c",
            _OFTEN,
            "embed",
            str(run_folder),
            str(folder),
            "--out",
            str(tmp_path / out),
            *size,
        ]

    subprocess.run(command("whole.safetensors"), cwd=ROOT, check=True, capture_output=True)
    process = subprocess.Popen(command("x.safetensors"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    note = tmp_path / "x.safetensors.part.json"
    deadline = time.monotonic() + 120
    while not (note.exists() and json.loads(note.read_text())["rows"] >= 100):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = subprocess.run(command("x.safetensors"), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "rows were there already" in done.stderr
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


_OFTEN = """
import sys
from gcahng.cli import main
from gcahng.evaluation import partial_embeddings
partial_embeddings._NOTE_EVERY = 0.0
sys.exit(main(sys.argv[1:]))
"""
