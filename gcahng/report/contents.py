"""What a report is made from: a run, the runs it is compared with, and its embeddings' ranking."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gcahng.data import DataSplits, LabeledImages, load_data
from gcahng.errors import UserError
from gcahng.report.embedding_map import EmbeddingMap, embedding_map
from gcahng.report.ranking import Ranking, rank
from gcahng.retrieval import retrieval_metrics
from gcahng.train.devices import resolve_device, torch_threads
from gcahng.train.evaluate import embed, evaluate_checkpoint
from gcahng.train.models import Model, load_model
from gcahng.train.records import read_records

NEIGHBOURS = 8


@dataclass(frozen=True)
class Run:
    """A run's numbers.

    Attributes:
        name: what the page calls it.
        loss: its loss's title.
        step: of the checkpoint that `metrics` belong to; None where unknown.
        metrics: on the test classes, as `retrieval_metrics` gives them.
        records: lines of its metrics.jsonl; none where there is no such file.
        digest: of its data.
    """

    name: str
    loss: str
    step: int | None
    metrics: dict[str, float]
    records: list[dict[str, Any]]
    digest: str | None


@dataclass(frozen=True)
class Contents:
    """Everything that the page shows.

    Attributes:
        run: the run itself.
        baselines: runs it is compared with.
        model: the run's network, where it came from and its options.
        images, gallery: the queries, and what they are searched in (the same where there is no gallery).
        ranking: neighbours of every query.
        map: some queries in the plane.
        queries: how many the grids show, each.
        seed: of random choices.
        same_data: whether the images are those of the training run.
    """

    run: Run
    baselines: list[Run]
    model: Model
    images: LabeledImages
    gallery: LabeledImages
    ranking: Ranking
    map: EmbeddingMap
    queries: int
    seed: int
    same_data: bool


def gather(
    source: Path,
    *,
    baselines: Sequence[Path],
    which: str,
    queries: int,
    map_method: str,
    seed: int,
    device: str,
    say: Callable[[str], None],
) -> Contents:
    """Embed the test images of the run's data and look at what they find; arguments as in `write_report`."""
    model = load_model(source, which)
    place = resolve_device(device)
    data = load_data(model.config.data)
    names = _names([source, *baselines])
    others = []  # first, so that a mistake in their names shows at once
    for name, path in zip(names[1:], baselines, strict=True):
        say(f"reading {path}")
        others.append(_baseline(name, path, which, data.recall_at, device))
    # The training run's number of threads, as `gcahng eval` takes it, so that the numbers are the same.
    with torch_threads(min(model.config.threads or 1, os.cpu_count() or 1)):
        embeddings, gallery = _embeddings(model, data, place, say)
        labels = data.test.labels
        gallery_labels = None if data.gallery is None else data.gallery.labels
        say("searching")
        searched = {"gallery_embeddings": gallery, "gallery_labels": gallery_labels}
        metrics = retrieval_metrics(embeddings, labels, recall_at=data.recall_at, **searched)
        ranking = rank(embeddings, labels, NEIGHBOURS, **searched)
        say("drawing the map")
        places = embedding_map(embeddings, labels, method=map_method, seed=seed)
    digest = model.data_digest
    run = Run(names[0], model.config.loss_title, model.step, metrics, _records(source), digest)
    return Contents(
        run=run,
        baselines=others,
        model=model,
        images=data.test,
        gallery=data.test if data.gallery is None else data.gallery,
        ranking=ranking,
        map=places,
        queries=queries,
        seed=seed,
        same_data=digest is None or digest == data.digest,
    )


def _embeddings(model: Model, data: DataSplits, place: Any, say: Callable[[str], None]) -> tuple[Tensor, Tensor | None]:
    network = model.network.to(place)
    workers = model.config.data.workers or 0
    parts = []
    for name, images in (("test", data.test), ("gallery", data.gallery)):
        if images is not None:
            say(f"embedding {len(images):,} {name} images")
            parts.append(embed(network, images, place, model.preprocessing, workers).cpu())
    return parts[0], parts[1] if len(parts) > 1 else None


def _baseline(name: str, path: Path, which: str, recall_at: Sequence[int], device: str) -> Run:
    """A run's test metrics: those of its summary where they are of the same checkpoint, else measured now."""
    summary = _summary(path) if which == "last" else None
    if summary is not None and all(f"recall@{k}" in summary["test"] for k in recall_at):
        return Run(name, summary["loss"], summary["steps"], summary["test"], _records(path), summary["data_digest"])
    model = load_model(path, which)
    found = evaluate_checkpoint(path, which=which, recall_at=recall_at, device=device)
    return Run(name, model.config.loss_title, found["steps"], found["test"], _records(path), model.data_digest)


def _summary(run: Path) -> dict[str, Any] | None:
    try:
        return json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{run}/summary.json cannot be read: {error}") from None


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return read_records(path) if path.is_file() else []


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or the whole path where that is not enough to tell them apart."""
    short = [path.resolve().name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
