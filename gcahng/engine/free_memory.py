"""How much memory a process may still take. The choice of edge_memory="auto" follows from it."""

from __future__ import annotations

from pathlib import Path

import torch


def free_memory(device: torch.device | str) -> int | None:
    """How much memory a process may still take on a device.

    On the CPU (Linux) it is what the kernel calls available, or what is left below a control group's limit if that is
    less. On CUDA it is what is free on the device, and what torch has reserved but does not use.

    Args:
        device: a CPU or CUDA device.

    Returns:
        Bytes, or None where they are not known.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*available, *_group_memory(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))], default=None)


def _group_memory(membership: Path, root: Path) -> list[int]:
    """Bytes that each control group of a process leaves it, from its own group up to the root.

    Page cache counts as free, since it can be given back.
    """
    try:
        groups = [line.split(":", 2)[1:] for line in membership.read_text().splitlines()]
    except OSError:
        return []
    left = []
    for controllers, path in groups:
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.strip("/")
        # In a container the group's own folder may be mounted as the root.
        for folder in (group, *group.parents):
            if (limit := _group_left(folder, *names)) is not None:
                left.append(limit)
            if folder == base:
                break
    return left


def _group_left(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Bytes that one control group leaves, None if it has no limit or cannot be read."""
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most == "max" else max(0, int(most) - used + int(stat.get(cache, 0)))
