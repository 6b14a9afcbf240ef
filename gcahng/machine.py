"""What a process may use of its machine: processors and memory, as affinity and control groups leave them.

setup.py reads this file by its path before gcahng is installed, so it imports nothing but the standard library.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

MEMBERSHIP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h of glibc


def keep_freed_memory() -> bool:
    """Lets this process use memory again that it has freed, instead of giving each large block back to the system.

    glibc gives back a block of more than 32 MiB as soon as it is freed, and the system clears every page of the next
    one. A network's outputs for an evaluation batch are such blocks: clearing them took a third of the time. Blocks of
    more than 64 MiB are still given back, and so is what lies unused at the end of the heap beyond 256 MiB. No result
    changes. Commands call it; a library should not decide this for the process that it is in.

    Returns:
        Whether it was set: not where the C library is another one, or where the environment has its own settings.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    import ctypes  # which a Python that builds gcahng may lack

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Both are set in any case: either of them switches off the thresholds that glibc adapts by itself.
    return mallopt is not None and all([mallopt(_MMAP_THRESHOLD, 64 << 20), mallopt(_TRIM_THRESHOLD, 256 << 20)])


def usable_cpus() -> int:
    """The processors that this process may use: those of its affinity, and no more than its control groups grant.

    Returns:
        At least 1. A share of a processor counts as a whole one.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *map(math.ceil, group_cpus(MEMBERSHIP, GROUPS))]))


def usable_memory() -> int | None:
    """Bytes that this process may still take.

    It is what the kernel (Linux) calls available, or what is left below a control group's limit if that is less.

    Returns:
        Bytes, or None where they are not known.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*available, *group_memory(MEMBERSHIP, GROUPS)], default=None)


def group_cpus(membership: Path, root: Path) -> list[float]:
    """Processors that each control group of a process grants, from its own group up to the root.

    Args:
        membership: the file that lists the groups, /proc/self/cgroup.
        root: where the groups are mounted, /sys/fs/cgroup.
    """
    granted = []
    for folder, second in _folders(membership, root, "cpu"):
        try:
            if second:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if quota not in ("max", "-1"):
                granted.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue  # a group without a limit
    return granted


def group_memory(membership: Path, root: Path) -> list[int]:
    """Bytes that each control group of a process leaves it, from its own group up to the root.

    Page cache counts as free, since it can be given back.

    Args:
        membership: the file that lists the groups, /proc/self/cgroup.
        root: where the groups are mounted, /sys/fs/cgroup.
    """
    second = ("memory.max", "memory.current", "inactive_file")
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    left = (_group_left(folder, *(second if new else first)) for folder, new in _folders(membership, root, "memory"))
    return [size for size in left if size is not None]


def _folders(membership: Path, root: Path, controller: str) -> list[tuple[Path, bool]]:
    """The folders of a process's groups, and whether each is of the second version of control groups."""
    try:
        groups = [line.split(":", 2)[1:] for line in membership.read_text().splitlines()]
    except OSError:
        return []
    folders = []
    for controllers, path in groups:
        if controllers == "":
            base, second = root, True
        elif controller in controllers.split(","):
            base, second = root / controller, False
        else:
            continue
        group = base / path.strip("/")
        # In a container the group's own folder may be mounted as the root.
        for folder in (group, *group.parents):
            folders.append((folder, second))
            if folder == base:
                break
    return folders


def _group_left(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Bytes that one control group leaves, None if it has no limit or cannot be read."""
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most == "max" else max(0, int(most) - used + int(stat.get(cache, 0)))
