"""examples/with_several_devices.py, in one process and on two "machines": two torchruns that find each other."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "with_several_devices.py"

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo"),
]


def alone(epochs: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--epochs", str(epochs), "--checkpoint", str(checkpoint)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_run_goes_on_on_two_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, shared = tmp_path / "whole.pt", tmp_path / "shared.pt"
    alone(2, whole, monkeypatch)
    wanted = capsys.readouterr().out
    alone(1, shared, monkeypatch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "run1"]
    command = [sys.executable, "-m", "torch.distributed.run", *words, "--rdzv-endpoint", f"localhost:{port}"]
    command += [str(SCRIPT), "--epochs", "1", "--checkpoint", str(shared)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    machines = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    found = "".join(out for out, _ in said)
    assert "2 process(es), epochs 2 to 2" in found and found.count("MAP@R") == 1
    (after,), (expected,) = (re.findall(r"before, ([\d.]+) after", text) for text in (found, wanted))
    assert abs(float(after) - float(expected)) <= 0.5
    one, other = (torch.load(path, weights_only=True) for path in (whole, shared))
    assert one["epoch"] == other["epoch"] == 2 and one["loss"].keys() == other["loss"].keys()
    for name, value in one["model"].items():  # float32, and sums in another order
        torch.testing.assert_close(other["model"][name], value, rtol=0, atol=1e-3 * float(value.abs().max()))
