"""What the planner divides: memory of the machine, and what control groups leave of it."""

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


def _group(folder: Path, limit: str, used: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 5\n{names[2]} 100\n")


def test_a_control_group_limits_free_memory(tmp_path: Path) -> None:
    second = ("memory.max", "memory.current", "inactive_file")
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    _group(tmp_path / "outer", "2000", 500, second)
    _group(tmp_path / "outer" / "inner", "max", 400, second)
    assert free_memory._group_memory(membership, tmp_path) == [1600]
    membership.write_text("3:cpu:/\n4:memory:/job\n")
    assert free_memory._group_memory(membership, tmp_path) == []
    _group(tmp_path / "memory", "9000", 1000, first)  # a container: its group is mounted as the root
    assert free_memory._group_memory(membership, tmp_path) == [8100]
    assert free_memory._group_memory(tmp_path / "none", tmp_path) == []
