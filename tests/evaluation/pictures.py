"""Folders of made-up pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

PIL_Image = pytest.importorskip("PIL.Image")


def draw_folder(root: Path, classes: int = 3, images: int = 7, seed: int = 0) -> Path:
    """root/c0/0.png …, noise of different sizes."""
    random = np.random.RandomState(seed)
    for c in range(classes):
        (root / f"c{c}").mkdir(parents=True)
        for i in range(images):
            pixels = random.randint(0, 255, (33 + c, 40, 3), np.uint8)
            PIL_Image.fromarray(pixels).save(root / f"c{c}" / f"{i}.png")
    return root
