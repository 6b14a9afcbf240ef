"""Augmentation of images. A seed and a step decide what is drawn, not the state of a generator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad

_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that a step's key differs from every other step's


def random_shifts(images: Tensor, max_shift: int, *, seed: int, step: int) -> Tensor:
    """Shift each image by a random whole number of pixels in both directions. Pixels that enter at an edge are 0.

    The shifts depend on `seed`, `step` and the place in the batch alone, so a resumed run draws the same ones.

    Args:
        images: (n, H, W) or (n, C, H, W), any dtype.
        max_shift: largest shift in pixels; each is drawn from −max_shift … max_shift.
        seed: seed of the run.
        step: number of the training step.

    Returns:
        The shifted images, with the shape, dtype and device of `images`.
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
    """Make torch's CPU generator depend on `key` alone inside the block, and restore its state afterwards.

    This is for transforms that take no generator of their own.

    Args:
        key: integers that decide what is drawn.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    before = torch.get_rng_state()
    # torch.manual_seed would seed CUDA's generators too.
    torch.default_generator.manual_seed(int.from_bytes(digest, "big") >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(before)
