"""The pictures that a run ends with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gcahng.config import TrainConfig
from gcahng.data import DataSplits, ImageFiles, LabeledImages, read_image
from gcahng.files import writing
from gcahng.runs.run_folder import check_run_lock


def draw_pictures(run: Path, data: DataSplits, embeddings: Tensor, config: TrainConfig) -> None:
    """Draw the curves, and a picture of retrieval among all test images, those of a gallery included."""
    from gcahng.runs.plots import plot_curves, plot_retrieval_grid

    check_run_lock(run)
    parts = [data.test] if data.gallery is None else [data.test, data.gallery]

    def picture(index: int) -> Tensor:
        part, index = (0, index) if index < len(data.test) else (1, index - len(data.test))
        return _picture(parts[part], index, config.data.image_size)

    with writing(run / "curves.png"):
        plot_curves(run / "metrics.jsonl", run / "curves.png")
    with writing(run / "retrieval.png"):
        plot_retrieval_grid(
            picture,
            torch.cat([part.labels for part in parts]),
            embeddings.cpu(),
            run / "retrieval.png",
            seed=config.seed,
            class_names=data.test.class_names,
        )


def _picture(images: LabeledImages, index: int, size: int) -> Tensor:
    """Image `index` as (H, W) or (3, H, W) in [0, 1]; files are scaled to a square."""
    if not isinstance(images, ImageFiles):
        return images.images[index].float() / 255
    square = read_image(images, index).resize((size, size))
    return torch.from_numpy(np.array(square)).movedim(2, 0).float() / 255
