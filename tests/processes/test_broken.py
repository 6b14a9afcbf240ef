"""A process that is killed, stopped or fails ends the whole job with one line, and the last checkpoint is whole."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from gcahng.runs.checkpoint import newest_checkpoint
from gcahng.train import resume

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo"),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are watched by way of /proc"),
]

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
LIMIT = 240  # seconds for a whole job, which ends long before
HOST = platform.node()
KILLED = "was killed, or ended without a word"
WAY_BACK = "; the last good checkpoint is of step 3; torchrun --nproc-per-node 2 -m gcahng train --resume run continues"


def start(folder: Path, *words: str, processes: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, str(Path(__file__).with_name("broken_job.py")), *words],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(job: subprocess.Popen[str]) -> str:
    """The one line that the job's processes print; the rest is torchrun's own."""
    _, err = job.communicate(timeout=LIMIT)
    assert job.returncode != 0
    lines = err.splitlines()
    ours = [line for line in lines if line.startswith("gcahng: ") and not line.startswith("gcahng: warning: ")]
    assert len(ours) == 1, err
    before = lines[: lines.index(ours[0])]
    of_torchrun = all("torch/distributed/elastic" in line or "warning: " in line for line in before)
    assert of_torchrun, f"more comes before the message:\n{err}"
    assert err.count("Traceback (most recent call last)") == 1 and "torch/distributed/run.py" in err, err
    return ours[0]


@pytest.mark.parametrize(
    ("point", "rank", "hurt", "cause"),
    [
        ("collective", 1, "STOP", "is stopped (SIGSTOP)"),
        ("batch", 1, "MEMORY", ": memory ran out"),
        pytest.param("collective", 0, "KILL", KILLED, marks=pytest.mark.slow),
        pytest.param("checkpoint", 0, "KILL", KILLED, marks=pytest.mark.slow),
        pytest.param("checkpoint", 0, "STOP", "is stopped (SIGSTOP)", marks=pytest.mark.slow),
        pytest.param(
            *("checkpoint", 0, "DISK", ": run/checkpoints/last.pt cannot be written: No space left on device"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_line_names_rank_host_and_cause(point: str, rank: int, hurt: str, cause: str, tmp_path: Path) -> None:
    """Of a process that is killed: see the last test, and for a full disk tests/train/test_processes.py."""
    check_one_line(point, rank, hurt, cause, tmp_path)


def check_one_line(point: str, rank: int, hurt: str, cause: str, folder: Path) -> None:
    timeout = "10" if hurt == "STOP" else "600"  # what does not wait for it must not need it
    line = told(start(folder, point, str(rank), hurt, "all:--timeout", f"all:{timeout}"))
    assert f"process {rank} of 2 on {HOST}" in line and cause in line
    if hurt != "MEMORY":
        assert WAY_BACK in line
    path, state, damaged = newest_checkpoint(folder / "run")
    assert path is not None and state["step"] == 3 and not damaged


def test_the_first_process_has_the_store_and_is_lost(tmp_path: Path) -> None:
    """As a launcher starts processes that is not torchrun: with the first one goes the way to tell each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, str(Path(__file__).with_name("broken_job.py")), "collective", "0", "KILL"]
    jobs = [
        subprocess.Popen(words, cwd=tmp_path, env={**ENVIRONMENT, **world, "RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    (_, _), (_, err) = (job.communicate(timeout=LIMIT) for job in jobs)
    assert [job.returncode for job in jobs] == [-signal.SIGKILL, 2]
    ours = [line for line in err.decode().splitlines() if line.startswith("gcahng: ")]
    assert (
        "Traceback" not in err.decode()
        and len(ours) == 1
        and ours[0].startswith(f"gcahng: error: process 0 of 2 on {HOST} was killed")
    ), err.decode()


def test_a_signal_ends_a_job_whose_other_process_hangs(tmp_path: Path) -> None:
    job = start(tmp_path, "collective", "1", "STOP")
    until = time.monotonic() + LIMIT
    while not any("T" in state for state in states(job.pid)):
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    line = told(job)
    assert line.startswith("gcahng: interrupted; process 1 of 2") and "(SIGSTOP)" in line and WAY_BACK in line


def states(parent: int) -> list[str]:
    """The states of a process's children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(fields[0])
    return found


def test_a_run_that_lost_a_process_goes_on_with_another_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_see_small_data: None, without_pictures: None
) -> None:
    check_one_line("collective", 1, "KILL", KILLED, tmp_path)
    three = start(tmp_path, "collective", "2", "KILL", "all:--resume", "all:run", processes=3)
    assert "process 2 of 3" in told(three)
    monkeypatch.chdir(tmp_path)
    assert resume("run")["steps"] == 9
