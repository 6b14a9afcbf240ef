"""A training step under NVIDIA's compute-sanitizer, where the machine has it and lets it run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
SCRIPT = Path(__file__).with_name("sanitized.py")
FOUND = 86  # the exit status that stands for errors found


def sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), f"{home}/bin")))


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Each tensor in an allocation of its own, so that what lies past its end is no other tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer(), "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=570)


@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found(tool, precision, impl):
    if sanitizer() is None:
        pytest.skip("no compute-sanitizer on this machine")
    trial = run(tool, "nothing")
    text = trial.stdout + trial.stderr
    if trial.returncode != 0 or "ready" not in text:
        print(text)
        pytest.skip(f"compute-sanitizer does not run here: {text.strip()[-300:]}")
    done = run(tool, impl, precision)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert "finished" in done.stdout
    assert done.returncode == 0
