"""What a run measures of its network: retrieval on validation and test classes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gcahng.data import DataSplits, LabeledImages, Preprocessing
from gcahng.retrieval import retrieval_metrics
from gcahng.train.config import TrainConfig
from gcahng.train.devices import deterministic
from gcahng.train.evaluate import embed

Split = Literal["val", "test"]


class Measured(NamedTuple):
    """metrics of retrieval; embeddings (N, D) of the split's images, then those of its gallery if it has one."""

    metrics: dict[str, float]
    embeddings: Tensor


def measure(model: nn.Module, data: DataSplits, split: Split, config: TrainConfig, device: torch.device) -> Measured:
    """Embed a split and search it: each image among the others, or test queries in the gallery where there is one."""
    preprocessing = Preprocessing(config.data.resize, config.data.image_size)
    workers = config.data.workers or 0

    def embedded(images: LabeledImages) -> Tensor:
        return embed(model, images, device, preprocessing, workers)

    images = getattr(data, split)
    queries = embedded(images)
    gallery = data.gallery if split == "test" else None
    found = None if gallery is None else embedded(gallery)
    # The search is exact and repeats anyway, but PyTorch takes its kthvalue for an operation that might not.
    with deterministic(False):
        metrics = retrieval_metrics(
            queries,
            images.labels.to(device),
            recall_at=data.recall_at,
            gallery_embeddings=found,
            gallery_labels=None if gallery is None else gallery.labels.to(device),
        )
    return Measured(metrics, queries if found is None else torch.cat([queries, found]))
