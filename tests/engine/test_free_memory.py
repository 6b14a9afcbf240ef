"""What the planner divides: memory of the machine."""

from __future__ import annotations

from pathlib import Path

from gcahng.engine import free_memory


def test_free_memory_is_that_of_this_machine() -> None:
    free = free_memory.free_memory("cpu")
    assert free_memory.free_memory("meta") is None
    if not Path("/proc/meminfo").exists():
        assert free is None
        return
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert 0 < free <= int(total.split()[1]) * 1024
