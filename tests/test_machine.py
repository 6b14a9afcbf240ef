"""What affinity and control groups leave a process of its machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gcahng import machine


def _memory_group(folder: Path, limit: str, used: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 5\n{names[2]} 100\n")


def test_a_control_group_limits_memory(tmp_path: Path) -> None:
    second = ("memory.max", "memory.current", "inactive_file")
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    _memory_group(tmp_path / "outer", "2000", 500, second)
    _memory_group(tmp_path / "outer" / "inner", "max", 400, second)
    assert machine.group_memory(membership, tmp_path) == [1600]
    membership.write_text("3:cpu:/\n4:memory:/job\n")
    assert machine.group_memory(membership, tmp_path) == []
    _memory_group(tmp_path / "memory", "9000", 1000, first)  # a container: its group is mounted as the root
    assert machine.group_memory(membership, tmp_path) == [8100]
    assert machine.group_memory(tmp_path / "none", tmp_path) == []


def test_a_control_group_limits_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "cpu.max").write_text("max 100000\n")
    assert machine.group_cpus(membership, tmp_path) == []
    (tmp_path / "outer" / "cpu.max").write_text("250000 100000\n")
    assert machine.group_cpus(membership, tmp_path) == [2.5]
    monkeypatch.setattr(machine, "MEMBERSHIP", membership)
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert machine.usable_cpus() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5}, raising=False)
    assert machine.usable_cpus() == 1
    membership.write_text("4:cpu,cpuacct:/\n")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.group_cpus(membership, tmp_path) == []
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    assert machine.group_cpus(membership, tmp_path) == [0.5]


FAULTS = """
import resource, sys, torch
from gcahng.machine import keep_freed_memory
print(keep_freed_memory())
for _ in range(16):  # the last blocks are some that were freed before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40 << 18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is for glibc")
@pytest.mark.thorough
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    seen = {}
    for name, settings in (("own", {}), ("theirs", {"MALLOC_TRIM_THRESHOLD_": "131072"})):
        done = subprocess.run([sys.executable, "-c", FAULTS], env=clean | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen[name] = done.stdout.split()
    assert seen["own"][0] == "True" and int(seen["own"][1]) < 1000
    assert seen["theirs"] == ["False", seen["theirs"][1]]
