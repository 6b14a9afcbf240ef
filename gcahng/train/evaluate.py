"""Retrieval metrics of a network on a set of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gcahng.data import LabeledImages, Preprocessing, evaluation_batches, load_data
from gcahng.retrieval import retrieval_metrics
from gcahng.train.devices import resolve_device, torch_threads
from gcahng.train.models import load_model

# Fixed, so that an evaluation repeats bit for bit: products of other batch sizes may round otherwise.
EVAL_BATCH = 256
RECALL_AT = (1, 2, 4, 8)


def embed(
    model: nn.Module,
    images: LabeledImages,
    device: torch.device,
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  # frozen
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """(N, D) fp32 embeddings of N images on `device`, in evaluation mode; the model's mode is restored.

    `progress` is called with the images embedded so far and all of them.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            rows: list[Tensor] = []
            for batch in evaluation_batches(images, preprocessing, EVAL_BATCH, workers):
                rows.append(model(batch.to(device)).float())
                if progress is not None:
                    progress(min(len(rows) * EVAL_BATCH, len(images)), len(images))
            return torch.cat(rows)
    finally:
        model.train(training)


def evaluate(
    model: nn.Module, images: LabeledImages, device: torch.device, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """`metrics_of` the network's embeddings of `images`."""
    return metrics_of(embed(model, images, device), images, recall_at)


def metrics_of(embeddings: Tensor, images: LabeledImages, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Recall@K, MAP@R and R-Precision of every image as a query among the others, by cosine similarity."""
    return retrieval_metrics(embeddings, images.labels.to(embeddings.device), recall_at=recall_at)


def evaluate_checkpoint(
    run_or_checkpoint: Path,
    *,
    which: str = "last",
    split: str = "test",
    recall_at: Sequence[int] = RECALL_AT,
    device: str = "auto",
) -> dict[str, Any]:
    """Retrieval metrics of a trained network; the same as `gcahng eval`.

    Args:
        run_or_checkpoint: a run folder, or a checkpoint file.
        which: checkpoint of a run folder, "last" or "best".
        split: "test", "val" or "train".
        recall_at: the K of Recall@K.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        {split: metrics, "checkpoint": its path, "steps": of its training, "same_data": whether all pixels of the data
        set are those of the training run}.

    Raises:
        UserError: no such checkpoint, or one that cannot be read; an argument out of range.
    """
    model = load_model(run_or_checkpoint, which)
    config = model.config
    place = resolve_device(device)
    data = load_data(config.data)
    # The training run's number of threads, so that the sums are rounded alike; more than there are cores only wait.
    with torch_threads(min(config.threads or 1, os.cpu_count() or 1)):
        metrics = evaluate(model.network.to(place), getattr(data, split), place, recall_at)
    return {
        split: metrics,
        "checkpoint": str(model.path),
        "steps": model.step,
        "same_data": data.digest == model.data_digest,
    }
