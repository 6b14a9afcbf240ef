"""What a run measures of its network: retrieval on validation and test classes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gcahng.data import DataSplits, LabeledImages, Preprocessing, usual_workers
from gcahng.errors import UserError
from gcahng.train.config import TrainConfig
from gcahng.train.devices import deterministic
from gcahng.train.evaluate import Gallery, embed, metrics_of

Split = Literal["val", "test"]


class Measured(NamedTuple):
    """metrics of retrieval; embeddings (N, D) of the split's images, then those of its gallery if it has one."""

    metrics: dict[str, float]
    embeddings: Tensor


def check_matches(data: DataSplits) -> None:
    """See that there is something to find, before anything is trained.

    Raises:
        UserError: no validation image, or no test image, has another of its class to be found.
    """
    for split, what in (("val", "validation"), ("test", "test")):
        images = getattr(data, split)
        if images is None:
            continue
        if split == "test" and data.gallery is not None:
            found, where = torch.isin(images.labels, data.gallery.labels).any(), "an image in the gallery"
        else:
            found, where = (images.labels.unique(return_counts=True)[1] > 1).any(), "a second image"
        if not found:
            raise UserError(f"no class of the {what} images has {where}, so that no search can be right; give it some")


def measure(model: nn.Module, data: DataSplits, split: Split, config: TrainConfig, device: torch.device) -> Measured:
    """Embed a split and search it: each image among the others, or test queries in the gallery where there is one."""
    preprocessing = Preprocessing(config.data.resize, config.data.image_size)
    workers = usual_workers(config.data.workers)

    def embedded(images: LabeledImages) -> Tensor:
        return embed(model, images, device, preprocessing, workers)

    images = getattr(data, split)
    queries = embedded(images)
    searched = None
    if split == "test" and data.gallery is not None:
        searched = Gallery(embedded(data.gallery), data.gallery.labels)
    # The search is exact and repeats anyway, but PyTorch takes its kthvalue for an operation that might not.
    with deterministic(False):
        metrics = metrics_of(queries, images, data.recall_at, searched)
    return Measured(metrics, queries if searched is None else torch.cat([queries, searched.embeddings]))
