"""Peak memory of a call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from gcahng.errors import UserError


def peak_memory(call: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Bytes that the call holds at its peak beyond what is held before it. Call it once beforehand, to warm up.

    On CUDA: torch's allocator. On the CPU: the process's high-water mark less its resident size, after what was freed
    earlier has gone back to the system (Linux with glibc alone).

    Raises:
        UserError: the call is on the CPU of another system.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the resident size
    except (OSError, AttributeError) as error:
        raise UserError(f"device is {str(device)!r}; peak memory on the CPU needs Linux with glibc ({error})") from None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"/proc/self/status has no {key}")
