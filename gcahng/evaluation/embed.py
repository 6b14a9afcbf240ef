"""Embeddings of images, in memory or in a file.

`embed_to_file` takes little memory, and continues where an earlier call was stopped. Beside the file X that is asked
for, `X.part` collects the rows as raw float32, and `X.part.json` says whose they are and how many are safely on the
disk. When all rows are there, X is written and both are removed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gcahng.bounds import check_fields
from gcahng.data import LabeledImages, Preprocessing, evaluation_batches
from gcahng.data.workers import leave_if_starting
from gcahng.evaluation.embed_job import (
    EVAL_BATCH,
    EmbedJob,
    EmbedOptions,
    EmbedResult,
    embedding_model,
    fingerprint,
    normalized,
)
from gcahng.evaluation.embed_parts import embed_in_parts
from gcahng.evaluation.partial_embeddings import PartialRows
from gcahng.models.model_file import Model
from gcahng.processes import Processes, run_processes
from gcahng.progress import Progress
from gcahng.retrieval.embeddings import check_free, check_suffix, read_embeddings
from gcahng.retrieval.items import Items

__all__ = [
    "EVAL_BATCH",
    "EmbedOptions",
    "EmbedResult",
    "embed",
    "embed_shared",
    "embed_to_file",
    "embedding_model",
    "fingerprint",
    "normalized",
]


def embed(
    model: nn.Module,
    images: LabeledImages,
    device: torch.device,
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  # frozen
    workers: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Embed images in evaluation mode; the model's mode is restored.

    Args:
        model: uint8 images → (n, D) embeddings, on `device`.
        images: N images, in memory or as files.
        device: where the network computes.
        preprocessing: of image files.
        workers: processes that read image files.
        progress: called with the images embedded so far and all of them.

    Returns:
        (N, D) fp32 embeddings on `device`.
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


def embed_shared(
    processes: Processes,
    model: nn.Module,
    images: LabeledImages,
    device: torch.device,
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  # frozen
    workers: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """As `embed`, where each process embeds a part, in the batches of a single process, and no image twice.

    Args:
        processes: that embed together.
        model: as for `embed`.
        images: as for `embed`.
        device: as for `embed`.
        preprocessing: as for `embed`.
        workers: as for `embed`.
        progress: as for `embed`.

    Returns:
        (N, D) fp32 embeddings in the first process, those of the own part in the others; on `device`.
    """
    with processes.together(patient=True):
        mine = torch.arange(len(images))[processes.part(len(images), EVAL_BATCH)]
        if len(mine) == len(images):
            rows = embed(model, images, device, preprocessing, workers, progress)
        elif len(mine):
            rows = embed(model, images.subset(mine), device, preprocessing, workers, progress)
        else:
            rows = torch.empty(0, 0, device=device)
    return processes.rows_on_first(rows)


def embed_to_file(
    model: Model,
    images: LabeledImages,
    items: Items,
    out: Path | str,
    *,
    preprocessing: Preprocessing | None = None,
    options: EmbedOptions | None = None,
    progress: Progress | None = None,
) -> EmbedResult:
    """Embed images into a file; where an earlier call was stopped, the same call continues and ends with the same bits.

    Memory does not grow with the number of images, because rows go to the disk as they come. Processes that torchrun
    started embed a part each; all must call it, unless it is within `gcahng.processes.alone()`.

    Args:
        model: the network.
        images: in memory or as files.
        items: what the images are, from one source.
        out: X.safetensors, X.parquet or X.npy, see `gcahng.retrieval.embeddings`.
        preprocessing: of image files; None: the model's.
        options: how the images are embedded; None: the defaults.
        progress: called with the images embedded so far and all of them.

    Returns:
        The embeddings, and what was left out or was there already.

    Raises:
        UserError: `out` or its .part was made from other images, another network or other options; or a file cannot be
            written.
        UnreadableImage: an image cannot be read, and `skip_unreadable` is off.
    """
    leave_if_starting()
    options = options or EmbedOptions()
    check_suffix("out", Path(out))
    check_fields(options)
    job = EmbedJob(model, images, items, Path(out), preprocessing or model.preprocessing, options)
    with run_processes(options.timeout) as processes:
        if processes.count > 1:
            return embed_in_parts(job, processes, progress)
    if (there := job.already()) is not None:
        return there
    check_free(job.out)
    with PartialRows(job.out, job.key()) as part:
        resumed = part.rows_done
        job.collect(part, progress)
        skipped = job.write(part)
    return EmbedResult(read_embeddings(job.out), [items.names[i] for i in skipped], resumed)
