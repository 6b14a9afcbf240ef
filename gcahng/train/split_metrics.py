"""Retrieval metrics on the validation and test classes, which a run measures during training."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gcahng.config import TrainConfig
from gcahng.data import DataSplits, LabeledImages, Preprocessing, usual_workers
from gcahng.devices import deterministic
from gcahng.errors import UserError
from gcahng.evaluation.embed import embed_shared
from gcahng.evaluation.evaluate import Gallery, metrics_of
from gcahng.processes import ALONE, Processes

Split = Literal["val", "test"]


class Measured(NamedTuple):
    """What was measured on a split.

    Attributes:
        metrics: of retrieval.
        embeddings: (N, D) of the split's images, followed by those of its gallery if it has one; in the first process
            only.
    """

    metrics: dict[str, float]
    embeddings: Tensor


def check_matches(data: DataSplits) -> None:
    """See that a search can succeed, before anything is trained.

    Raises:
        UserError: no validation image, or no test image, has another image of its class to be found.
    """
    for split, what in (("val", "validation"), ("test", "test")):
        images = getattr(data, split)
        if images is None:
            continue
        if split == "test" and data.gallery is not None:
            has_match, where = torch.isin(images.labels, data.gallery.labels).any(), "an image in the gallery"
        else:
            has_match, where = (images.labels.unique(return_counts=True)[1] > 1).any(), "a second image"
        if not has_match:
            raise UserError(
                f"no class of the {what} images has {where}, so that no search can be right; a class must have one"
            )


def measure(
    model: nn.Module,
    data: DataSplits,
    split: Split,
    config: TrainConfig,
    device: torch.device,
    processes: Processes = ALONE,
) -> Measured:
    """Embed a split and search it: each image among the others, or in the gallery where the test split has one.

    Each process embeds a part, in the batches of a single process. The first one searches, and the others get its
    metrics.

    Args:
        model: the network.
        data: the splits.
        split: "val" or "test".
        config: of the run.
        device: of the network.
        processes: that measure together.
    """
    preprocessing = Preprocessing(config.data.resize, config.data.image_size)
    workers = usual_workers(config.data.workers)

    def embedded(images: LabeledImages) -> Tensor:
        return embed_shared(processes, model, images, device, preprocessing, workers)

    images = getattr(data, split)
    queries = embedded(images)
    searched = None
    if split == "test" and data.gallery is not None:
        searched = Gallery(embedded(data.gallery), data.gallery.labels)
    # The search is exact and repeats, but PyTorch takes its kthvalue for an operation that may not.
    with deterministic(False):
        metrics = processes.on_first(lambda: metrics_of(queries, images, data.recall_at, searched))
    whole = processes.first and searched is not None  # the first process alone has all rows
    return Measured(metrics, torch.cat([queries, searched.embeddings]) if whole else queries)
