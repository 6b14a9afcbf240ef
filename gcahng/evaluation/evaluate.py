"""Retrieval metrics of a network on a set of images, or of the embeddings in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gcahng.bounds import check_number
from gcahng.data import LabeledImages, Preprocessing, load_data, usual_workers
from gcahng.devices import torch_threads
from gcahng.errors import UserError
from gcahng.evaluation.embed import embed, embed_shared, fingerprint
from gcahng.evaluation.image_inputs import choose_split, with_data
from gcahng.models.model_file import load_model
from gcahng.processes import TIMEOUT, run_processes
from gcahng.progress import Progress, no_progress
from gcahng.retrieval import retrieval_metrics

RECALL_AT = (1, 2, 4, 8)


@dataclass(frozen=True)
class EvalOptions:
    """What is measured, see `gcahng.retrieval.retrieval_metrics`.

    Attributes:
        metrics: any of recall, precision, map, map@r and r_precision.
        recall_at: the K of Recall@K; None: the data set's.
        precision_at: the K of Precision@K, which is then measured in any case; (): 1 and 10 where `metrics` asks for
            precision.
        map_at: the K of MAP@K, which is then measured in any case; (): 10 where `metrics` asks for map.
        ties: the order of gallery images at the same distance: index, expected, optimistic or pessimistic.
        protocol: exact; or official, as the authors evaluate.
        per_class: whether the metrics of each class are measured too.
        clustering: whether NMI and AMI of k-means are measured too, which takes long.
        seed: of k-means.
    """

    metrics: tuple[str, ...] = ("recall", "map@r", "r_precision")
    recall_at: tuple[int, ...] | None = None
    precision_at: tuple[int, ...] = ()
    map_at: tuple[int, ...] = ()
    ties: str = "index"
    protocol: str = "exact"
    per_class: bool = False
    clustering: bool = False
    seed: int = 0

    def arguments(self, recall_at: Sequence[int]) -> dict[str, Any]:
        """The arguments of `retrieval_metrics`; `recall_at` are the data set's K."""
        asked = {"precision": self.precision_at, "map": self.map_at}
        names = [*self.metrics, *(name for name, at in asked.items() if at and name not in self.metrics)]
        recalls = recall_at if self.recall_at is None else self.recall_at
        chosen = {f"{name}_at": at for name, at in asked.items() if at}
        return {
            "metrics": tuple(names),
            "recall_at": tuple(recalls),
            "ties": self.ties,
            "protocol": self.protocol,
            **chosen,
        }


@dataclass(frozen=True)
class Gallery:
    """What queries are searched in.

    Attributes:
        embeddings: (m, D).
        labels: (m,) in the numbering of the queries' labels.
    """

    embeddings: Tensor
    labels: Tensor


def evaluate(
    model: nn.Module,
    images: LabeledImages,
    device: torch.device,
    recall_at: Sequence[int] = RECALL_AT,
    *,
    gallery: LabeledImages | None = None,
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  # frozen
    workers: int = 0,
) -> dict[str, float]:
    """Embed images and measure retrieval among them, see `metrics_of`.

    Args:
        model: uint8 images → (n, D) embeddings, on `device`.
        images: the queries.
        device: where the network computes.
        recall_at: the K of Recall@K.
        gallery: the images that the queries are searched in; None: the queries themselves.
        preprocessing: of image files.
        workers: processes that read image files.

    Returns:
        The metrics as fractions, by name.
    """
    searched = None
    if gallery is not None:
        searched = Gallery(embed(model, gallery, device, preprocessing, workers), gallery.labels)
    return metrics_of(embed(model, images, device, preprocessing, workers), images, recall_at, searched)


def metrics_of(
    embeddings: Tensor, images: LabeledImages, recall_at: Sequence[int] = RECALL_AT, gallery: Gallery | None = None
) -> dict[str, float]:
    """Recall@K, MAP@R and R-Precision by cosine similarity.

    Args:
        embeddings: (n, D) of the queries.
        images: the queries; their labels are used.
        recall_at: the K of Recall@K.
        gallery: what is searched; None: each query is searched among the other queries.

    Returns:
        The metrics as fractions, by name.
    """
    return retrieval_metrics(embeddings, images.labels.to(embeddings.device), recall_at=recall_at, **_searched(gallery))


def measure(
    embeddings: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    options: EvalOptions,
    *,
    recall_at: Sequence[int] = RECALL_AT,
    gallery: Gallery | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, float], dict[str, dict[str, float]] | None]:
    """Measure all that `options` ask for.

    Args:
        embeddings: (n, D) the queries.
        labels: (n,) their classes.
        class_names: the name of each label.
        options: what is measured.
        recall_at: the K of Recall@K where the options do not set them.
        gallery: what is searched; None: the queries themselves.
        progress: called with the queries done so far and all of them.

    Returns:
        The metrics, and those of each class by its name (None without `per_class`).
    """
    arguments = {**options.arguments(recall_at), **_searched(gallery), "progress": progress}
    if options.per_class:
        result = retrieval_metrics(embeddings, labels, per_class=True, **arguments)
        metrics, classes = result.overall, {class_names[c]: values for c, values in result.per_class.items()}
    else:
        metrics, classes = retrieval_metrics(embeddings, labels, **arguments), None
    if options.clustering:
        from gcahng.retrieval import clustering_metrics

        metrics = metrics | clustering_metrics(embeddings, labels, seed=options.seed)
    return metrics, classes


def evaluate_checkpoint(
    run_or_checkpoint: Path | str,
    *,
    which: str = "last",
    split: str = "test",
    options: EvalOptions | None = None,
    data: dict[str, Any] | None = None,
    device: str = "auto",
    timeout: float = TIMEOUT,
    progress: Callable[[str], Progress] | None = None,
) -> dict[str, Any]:
    """Retrieval metrics of a trained network; the same as `gcahng eval`.

    Processes that torchrun started embed a part of the images each. The first one searches, and all get its metrics,
    which are those of a single process. All must call it, unless it is within `gcahng.processes.alone()`.

    Args:
        run_or_checkpoint: a run folder, a checkpoint file, or a .safetensors file.
        which: checkpoint of a run folder, "last" or "best".
        split: "test" (searched in the gallery, where the data set has one), "val" or "train".
        options: what is measured.
        data: fields of `DataConfig` that override those of the run, such as {"name": "cub200", "root": …}.
        device: "auto", "cpu", "cuda" or "cuda:N".
        timeout: seconds that several processes wait for one of them.
        progress: called with the name of each part of the work; it returns the `Progress` of that part.

    Returns:
        {split: metrics, "checkpoint": its path, "steps": of its training (None where unknown), "data": the data set,
        "same_data": whether all images of the data set are those of the training run (None where that means nothing),
        "protocol", "ties"}, and with `per_class` "per_class": metrics by class name.

    Raises:
        UserError: there is no such checkpoint, it cannot be read, or an argument is out of range.
    """
    options = options or EvalOptions()
    note = progress or (lambda what: no_progress)
    check_number("timeout", timeout)
    with run_processes(timeout) as processes:
        asked = {"RUN_OR_CHECKPOINT": str(run_or_checkpoint), "which": which, "split": split, "options": repr(options)}
        asked |= {"timeout": str(timeout)}
        processes.same(
            {
                **asked,
                "device": device,
                "timeout": timeout,
                "data": {**(data or {}), "root": "", "csv": "", "workers": 0},
            }
        )
        with processes.together(patient=True), processes.in_turn():
            model = load_model(run_or_checkpoint, which)
            config = with_data(model.config.data, data or {})
            place = processes.device(device)
            splits = load_data(config)
            images = choose_split(splits, split, config.name)
        processes.same({"the digest of the network": fingerprint(model)[:12], "the digest of the data": splits.digest})
        processes.check_devices(place)
        gallery = splits.gallery if split == "test" else None
        preprocessing = Preprocessing(config.resize, config.image_size)
        # As many threads as the training run had, so that sums are rounded alike, but no more than there are cores.
        threads = min(model.config.threads or torch.get_num_threads(), os.cpu_count() or 1)
        with torch_threads(threads):
            network = model.network.to(place)
            how = (place, preprocessing, usual_workers(config.workers))
            embeddings = embed_shared(processes, network, images, *how, note("embedding"))
            searched = None
            if gallery is not None:
                rows = embed_shared(processes, network, gallery, *how, note("embedding the gallery"))
                searched = Gallery(rows, gallery.labels)
            metrics, classes = processes.on_first(
                lambda: measure(
                    embeddings,
                    images.labels.to(embeddings.device),
                    images.class_names,
                    options,
                    recall_at=splits.recall_at,
                    gallery=searched,
                    progress=note("searching"),
                )
            )
    comparable = model.data_digest is not None and config.name == model.config.data.name
    result = {
        split: metrics,
        "checkpoint": str(model.path),
        "steps": model.step,
        "data": config.name,
        "same_data": splits.digest == model.data_digest if comparable else None,
        "protocol": options.protocol,
        "ties": options.ties,
    }
    return result if classes is None else {**result, "per_class": classes}


def evaluate_embeddings(
    embeddings: Path | str,
    gallery: Path | str | None = None,
    *,
    options: EvalOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Retrieval metrics of embeddings with labels in a file; the same as `gcahng eval --embeddings`.

    Args:
        embeddings: the queries, see `gcahng.retrieval.embeddings`.
        gallery: what they are searched in; None: themselves.
        options: what is measured.
        progress: called with the queries done so far and all of them.

    Returns:
        {"embeddings": metrics, "file": the path, "gallery": its path or None}, and as `evaluate_checkpoint`.

    Raises:
        UserError: a file cannot be read or has no labels, or the embeddings are of different networks.
    """
    from gcahng.retrieval.embeddings import read_embeddings

    options = options or EvalOptions()
    queries = read_embeddings(embeddings)
    items, searched = queries.items, None
    if not items.labeled:
        raise UserError(f"{embeddings} has rows without a label; metrics need the class of each")
    if gallery is not None:
        others = read_embeddings(gallery)
        if not others.items.labeled:
            raise UserError(f"{gallery} has rows without a label; metrics need the class of each")
        if queries.model and others.model and (difference := queries.model.difference(others.model)):
            raise UserError(f"{embeddings} and {gallery} do not fit: {difference}")
        items = items.followed_by(others.items)
        searched = Gallery(others.embeddings, items.labels[len(queries) :])
    labels = items.labels[: len(queries)]
    metrics, classes = measure(
        queries.embeddings, labels, items.class_names, options, gallery=searched, progress=progress
    )
    result = {"embeddings": metrics, "file": str(embeddings), "gallery": gallery and str(gallery)}
    result |= {"protocol": options.protocol, "ties": options.ties}
    return result if classes is None else {**result, "per_class": classes}


def _searched(gallery: Gallery | None) -> dict[str, Tensor]:
    """The gallery as arguments of `retrieval_metrics`."""
    if gallery is None:
        return {}
    return {"gallery_embeddings": gallery.embeddings, "gallery_labels": gallery.labels}
