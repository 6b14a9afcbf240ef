"""How much memory a process may still take. The choice of edge_memory="auto" follows from it."""

from __future__ import annotations

import torch

from gcahng import machine


def free_memory(device: torch.device | str) -> int | None:
    """How much memory a process may still take on a device.

    On the CPU (Linux) it is what `machine.usable_memory` says. On CUDA it is what is free on the device, and what torch
    has reserved but does not use.

    Args:
        device: a CPU or CUDA device.

    Returns:
        Bytes, or None where they are not known.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return machine.usable_memory() if device.type == "cpu" else None
