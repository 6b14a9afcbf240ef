"""Random shifts: what they do to pixels, and what decides them."""

from __future__ import annotations

import pytest
import torch

from gcahng.data import random_shifts


@pytest.mark.parametrize("shape", [(200, 9, 11), (200, 3, 9, 11)])
def test_every_image_is_shifted_by_its_own_whole_pixels(shape: tuple[int, ...]) -> None:
    images = torch.randint(1, 256, shape, dtype=torch.uint8)
    shifted = random_shifts(images, 2, seed=0, step=0)
    assert shifted.shape == images.shape and shifted.dtype == images.dtype
    found = set()
    for image, moved in zip(images, shifted, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        places = [(y, x) for y in range(5) for x in range(5) if torch.equal(padded[..., y : y + 9, x : x + 11], moved)]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) == 25


def test_seed_and_step_decide() -> None:
    images = torch.randint(1, 256, (48, 8, 8), dtype=torch.uint8)
    one = random_shifts(images, 2, seed=3, step=7)
    torch.manual_seed(123)
    assert torch.equal(one, random_shifts(images, 2, seed=3, step=7))
    assert not torch.equal(one, random_shifts(images, 2, seed=3, step=8))
    assert not torch.equal(one, random_shifts(images, 2, seed=4, step=7))


def test_no_shift_leaves_images_alone() -> None:
    images = torch.randint(1, 256, (4, 8, 8), dtype=torch.uint8)
    assert torch.equal(images, random_shifts(images, 0, seed=0, step=0))
