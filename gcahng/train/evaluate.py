"""Retrieval metrics of a network on a set of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gcahng.data import DataSplits, ImageSet, load_glyphs
from gcahng.retrieval import clustering_metrics, retrieval_metrics
from gcahng.train.checkpoint import find_checkpoint, load_backbone, load_checkpoint
from gcahng.train.config import DataConfig
from gcahng.train.devices import resolve_device, torch_threads

# Fixed, so that an evaluation repeats bit for bit: products of other batch sizes may round otherwise.
EVAL_BATCH = 256
RECALL_AT = (1, 2, 4, 8)


def load_data(config: DataConfig) -> DataSplits:
    """The data set that `config` names."""
    return {"glyphs": load_glyphs}[config.name](config.train_classes, config.val_classes)


def embed(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """(N, …) uint8 images → (N, D) fp32 embeddings on `device`, in evaluation mode; the model's mode is restored."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return torch.cat([model(batch.to(device)).float() for batch in images.split(EVAL_BATCH)])
    finally:
        model.train(training)


def evaluate(
    model: nn.Module, images: ImageSet, device: torch.device, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """`metrics_of` the network's embeddings of `images`."""
    return metrics_of(embed(model, images.images, device), images, recall_at)


def metrics_of(embeddings: Tensor, images: ImageSet, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Recall@K, MAP@R and R-Precision of every image as a query among the others, by cosine similarity."""
    return retrieval_metrics(embeddings, images.labels.to(embeddings.device), recall_at=recall_at)


def evaluate_checkpoint(
    run_or_checkpoint: Path,
    *,
    which: str = "last",
    split: str = "test",
    recall_at: Sequence[int] = RECALL_AT,
    device: str = "auto",
    clustering: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Retrieval metrics of a trained network; the same as `gcahng eval`.

    Args:
        run_or_checkpoint: a run folder, or a checkpoint file.
        which: checkpoint of a run folder, "last" or "best".
        split: "test", "val" or "train".
        recall_at: the K of Recall@K.
        device: "auto", "cpu", "cuda" or "cuda:N".
        clustering: also NMI and AMI of k-means, which take longer than all the others together.
        options: of `retrieval_metrics`: `metrics`, `ties`, `protocol`, `per_class` and more.

    Returns:
        {split: metrics, with `per_class` "per_class": metrics by label, "checkpoint": its path, "steps": of its
        training, "same_data": whether all pixels of the data set are those of the training run}.

    Raises:
        UserError: no such checkpoint, or one that cannot be read; an argument out of range.
    """
    path = find_checkpoint(run_or_checkpoint, which)
    state = load_checkpoint(path)
    model, config = load_backbone(state)
    place = resolve_device(device)
    data = load_data(config.data)
    images = getattr(data, split)
    # The training run's number of threads, so that the sums are rounded alike; more than there are cores only wait.
    with torch_threads(min(config.threads or 1, os.cpu_count() or 1)):
        embeddings = embed(model.to(place), images.images, place)
        found = retrieval_metrics(embeddings, images.labels.to(place), recall_at=recall_at, **options)
        metrics, per_class = (
            (found.overall, {"per_class": found.per_class}) if options.get("per_class") else (found, {})
        )
        if clustering:
            metrics |= clustering_metrics(embeddings, images.labels)
    return {
        split: metrics,
        **per_class,
        "checkpoint": str(path),
        "steps": state["step"],
        "same_data": data.digest == state["data_digest"],
    }
