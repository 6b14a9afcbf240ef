"""Sizes of images that a network cannot take, because nothing is left of them after its strides."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

# Beyond these sides no network is tried.
_MOST = 1024
_ONE_BY_ONE = 64


def next_size(body: nn.Module, images: Tensor) -> int | None:
    """The next larger side of square images that a network takes, where it cannot take these.

    It runs on the meta device, where tensors have shapes and no values.

    Args:
        body: the network.
        images: (n, C, H, W) that it failed on.

    Returns:
        The side in pixels; None where the network takes images of this size, or of none.
    """
    body = copy.copy(body)  # without its compiled form
    tensors = {**dict(body.named_parameters()), **dict(body.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}

    def takes(height: int, width: int) -> bool:
        size = (2, images.shape[1], height, width)
        try:
            with torch.no_grad():
                functional_call(body, shapes, (torch.empty(size, dtype=images.dtype, device="meta"),))
        except Exception:  # each layer has its own
            return False
        return True

    height, width = images.shape[-2:]
    if takes(height, width):
        return None
    first = min(height, width) + 1
    for size in range(first, first + _ONE_BY_ONE):
        if takes(size, size):
            return size
    coarse = range(-(-(first + _ONE_BY_ONE) // 8) * 8, _MOST + 1, 8)
    found = next((size for size in coarse if takes(size, size)), None)
    return None if found is None else next(size for size in range(found - 7, found + 1) if takes(size, size))
