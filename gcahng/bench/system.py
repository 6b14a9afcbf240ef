"""What a measurement depends on besides the code: processor, threads and allocator, and the rate of matrix products."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gcahng import native
from gcahng.bench.cases import PRECISIONS
from gcahng.engine.schedule import default_tile_rows
from gcahng.machine import usable_cpus

_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "GCAHNG_CPU_ARCH",
    "LD_PRELOAD",
    "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
)


def settings() -> dict[str, str | int]:
    """The processor, versions, threads and C library, and the environment variables that change memory allocation.

    Variables that are not set are left out.
    """
    facts: dict[str, str | int] = {
        "cpu": cpu_model(),
        "cores": usable_cpus(),
        "threads": torch.get_num_threads(),
        "instruction set": native.cpu_arch() or "none: no native library",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()).strip() or "unknown",
        "huge pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
    }
    return facts | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


# The names that nvidia-smi uses, and ours.
_CARD = {
    "name": "card",
    "driver_version": "driver",
    "compute_cap": "compute capability",
    "memory.total": "memory",
    "clocks.max.sm": "largest SM clock",
    "clocks.sm": "SM clock",
    "clocks.mem": "memory clock",
    "power.limit": "power limit",
    "temperature.gpu": "temperature",
}


def card() -> dict[str, str]:
    """The current state of the first GPU, from nvidia-smi; empty without it. This opens no CUDA context."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_CARD)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(_CARD.values(), values, strict=True)) if len(values) == len(_CARD) else {}


def describe(facts: dict[str, str | int]) -> str:
    """The result of `settings` as two lines of text."""
    named = [f"{name} {value}" for name, value in facts.items() if not name.isupper()]
    variables = [f"{name}={value}" for name, value in facts.items() if name.isupper()]
    return f"{', '.join(named)}\nenvironment: {' '.join(variables) or 'the defaults for threads and malloc'}"


class ProductRate:
    """Times matrix products of the size that the edge MLP has: the rows of a tile times (D, 4D).

    Args:
        dim: D.
        precision: one of `PRECISIONS`.
        device: "cpu" or "cuda".

    Attributes:
        flops: floating-point operations of one product.
    """

    def __init__(self, dim: int, precision: str, device: str = "cpu") -> None:
        dtype = PRECISIONS[precision]
        rows = default_tile_rows(dim, dtype, device_type=device)
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(rows, dim, generator=generator).to(device, dtype)
        self._w = torch.randn(4 * dim, dim, generator=generator).to(device, dtype)
        self._out = torch.empty(rows, 4 * dim, dtype=dtype, device=device)
        self.flops, self.device = 2 * rows * dim * 4 * dim, device
        self()

    def __call__(self) -> float:
        """The seconds of one product."""
        return seconds(lambda: torch.mm(self._x, self._w.T, out=self._out), self.device)

    def rate(self, reps: int = 15) -> float:
        """The FLOP/s of the median of `reps` products in a row."""
        times = sorted(self() for _ in range(reps))
        return self.flops / times[len(times) // 2]


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """The seconds that one call takes; on CUDA, by the clock of the device."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu_model() -> str:
    lines = _read("/proc/cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"
