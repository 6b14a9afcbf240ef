"""Augmentation of images, keyed on a seed and a counter instead of on a generator's state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad

_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that a step's key differs from every other step's


def random_shifts(images: Tensor, max_shift: int, *, seed: int, step: int) -> Tensor:
    """Shift every image by its own whole pixels, −max_shift … max_shift each way; what comes in at the edge is 0.

    The shifts follow from (`seed`, `step`, place in the batch) alone, so a run that is resumed draws the same ones.

    Args:
        images: (n, H, W) or (n, C, H, W), any dtype.

    Returns:
        Shifted images, same shape, dtype and device.
    """
    if max_shift == 0:
        return images
    generator = torch.Generator().manual_seed((seed + (step + 1) * _GOLDEN) % 2**63)
    shifts = torch.randint(0, 2 * max_shift + 1, (2, len(images)), generator=generator).to(images.device)
    height, width = images.shape[-2:]
    padded = pad(images, (max_shift,) * 4)
    rows = shifts[0, :, None] + torch.arange(height, device=images.device)
    columns = shifts[1, :, None] + torch.arange(width, device=images.device)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    if images.ndim == 3:
        return padded[batch, rows[:, :, None], columns[:, None, :]]
    return padded.movedim(1, -1)[batch, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@contextmanager
def drawing(*key: int) -> Iterator[None]:
    """Within, torch's generator of the CPU draws what follows from `key` alone; afterwards it is as it was before.

    For transforms that take no generator of their own.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    before = torch.get_rng_state()
    # Not torch.manual_seed, which seeds CUDA's generators too.
    torch.default_generator.manual_seed(int.from_bytes(digest, "big") >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(before)
