"""What a run measures of its network: retrieval on validation and test classes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gcahng.data import DataSplits, LabeledImages, Preprocessing
from gcahng.retrieval import retrieval_metrics
from gcahng.train.config import TrainConfig
from gcahng.train.evaluate import embed

Split = Literal["val", "test"]


class Measured(NamedTuple):
    """metrics of retrieval; embeddings (N, D) of the split's images (of the queries where there is a gallery)."""

    metrics: dict[str, float]
    embeddings: Tensor


def measure(model: nn.Module, data: DataSplits, split: Split, config: TrainConfig, device: torch.device) -> Measured:
    """Embed a split and search it: each image among the others, or test queries in the gallery where there is one."""
    preprocessing = Preprocessing(config.data.resize, config.data.image_size)
    workers = config.data.workers or 0

    def embedded(images: LabeledImages) -> Tensor:
        return embed(model, images, device, preprocessing, workers)

    images = getattr(data, split)
    embeddings = embedded(images)
    gallery = data.gallery if split == "test" else None
    metrics = retrieval_metrics(
        embeddings,
        images.labels.to(device),
        recall_at=data.recall_at,
        gallery_embeddings=None if gallery is None else embedded(gallery),
        gallery_labels=None if gallery is None else gallery.labels.to(device),
    )
    return Measured(metrics, embeddings)
