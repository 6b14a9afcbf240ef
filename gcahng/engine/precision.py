"""Which dtype the engine's matrix products run in."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Decides the dtype of a pass's products.

    It is bf16 under bf16 autocast, and else the tensors' own. Under fp16 autocast products stay in fp32: gradients are
    formed in the forward, where no GradScaler can lift them into fp16's range. A warning says so once, and another
    warning is given where a CPU has no instructions for bf16 products.

    Args:
        device: device of the tensors.
        dtype: their dtype.
    """
    if dtype is not torch.float32 or not torch.is_autocast_enabled(device.type):
        return dtype
    low = torch.get_autocast_dtype(device.type)
    if low is torch.bfloat16:
        note_bf16(device)
        return low
    if not torch.compiler.is_compiling():
        _warn_of_fp16()
    return dtype


def note_bf16(device: torch.device) -> None:
    """Warns once if products or stored edges are to be bf16 on a CPU that has no instructions for it."""
    if device.type == "cpu" and not torch.compiler.is_compiling():
        _warn_of_slow_bf16()


@cache
def _warn_of_fp16() -> None:
    warnings.warn(
        "fp16 autocast: the engine's products stay in float32; use torch.bfloat16 for lower precision", stacklevel=2
    )


@cache
def _warn_of_slow_bf16() -> None:
    if _cpu_lacks_bf16():
        warnings.warn(
            "this CPU has no bf16 instructions; bf16 products and edges are likely slower than float32 here",
            stacklevel=2,
        )


def _cpu_lacks_bf16() -> bool:
    """Whether this is an x86 processor without bf16 extensions. False where that cannot be told."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return bool(flags) and not {"avx512_bf16", "amx_bf16"} & set(flags.split())


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name without "torch.", such as "float32"."""
    return str(dtype).removeprefix("torch.")
