"""What a report is made from: a run, the runs it is compared with, and its embeddings' ranking."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcahng.data import DataSplits, LabeledImages, load_data, usual_workers
from gcahng.devices import resolve_device, torch_threads
from gcahng.evaluation.embed import embed
from gcahng.evaluation.evaluate import Gallery, metrics_of
from gcahng.models.model_file import Model, load_model
from gcahng.progress import Progress
from gcahng.report.embedding_map import EmbeddingMap, embedding_map
from gcahng.report.options import ReportOptions
from gcahng.report.ranking import Ranking, rank
from gcahng.runs.records import read_records
from gcahng.runs.summary import read_summary

NEIGHBORS = 8


@dataclass(frozen=True)
class Run:
    """A run's numbers.

    Attributes:
        name: what the page calls it.
        loss: its loss's title.
        step: of the checkpoint that `metrics` belong to; None where unknown.
        metrics: on the test classes, as `retrieval_metrics` gives them.
        records: the lines of its metrics.jsonl; none where there is no such file.
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
        baselines: the runs that it is compared with.
        model: the run's network, where it came from and its options.
        images: the queries.
        gallery: what they are searched in; the queries themselves where the data set has no gallery.
        ranking: the neighbors of every query.
        map: some queries in the plane.
        queries: how many queries each grid shows.
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


def gather(source: Path, options: ReportOptions, say: Callable[[str], None], progress: Progress) -> Contents:
    """Embed the test images of a run's data and search them.

    Args:
        source: a run folder, a checkpoint or a model file.
        options: of the report.
        say: called with a line about each thing that is done.
        progress: called with the images embedded so far and all of them.

    Returns:
        Everything that the page shows.

    Raises:
        UserError: the run, a baseline or the data cannot be read.
    """
    model = load_model(source, options.which)
    records = _records(source)  # before the long work, which a damaged line would make vain
    measure = _Measure(resolve_device(options.device), options.data_root, say, progress)
    data = measure.data(model)
    paths = [source, *map(Path, options.baselines)]
    names = _names(paths)
    # The baselines come first, so that a mistake in their names shows at once.
    baselines = [
        _baseline(name, path, options.which, data.recall_at, measure)
        for name, path in list(zip(names, paths, strict=True))[1:]
    ]
    embeddings, gallery, metrics = measure(model, data, data.recall_at)
    say("drawing the map and the page")
    labels = data.test.labels
    gallery_labels = None if data.gallery is None else data.gallery.labels
    digest = model.data_digest
    return Contents(
        run=Run(names[0], model.config.loss_title, model.step, metrics, records, digest),
        baselines=baselines,
        model=model,
        images=data.test,
        gallery=data.test if data.gallery is None else data.gallery,
        ranking=rank(embeddings, labels, NEIGHBORS, gallery, gallery_labels),
        map=embedding_map(embeddings, labels, method=options.map_method, seed=options.seed),
        queries=options.queries,
        seed=options.seed,
        same_data=digest is None or digest == data.digest,
    )


@dataclass(frozen=True)
class _Measure:
    """Embeds the test images of models, and measures what they find."""

    place: torch.device
    root: Path | str | None
    say: Callable[[str], None]
    progress: Progress

    def data(self, model: Model) -> DataSplits:
        config = model.config.data
        return load_data(config if self.root is None else replace(config, root=str(self.root)))

    def __call__(
        self, model: Model, data: DataSplits, recall_at: Sequence[int]
    ) -> tuple[Tensor, Tensor | None, dict[str, float]]:
        """The embeddings of the test images and of the gallery (None without one), on the CPU, and the metrics."""
        # As many threads as `gcahng eval` takes, which are those of the training run, so that the numbers are equal.
        with torch_threads(min(model.config.threads or torch.get_num_threads(), os.cpu_count() or 1)):
            queries = self._embed(model, "test", data.test)
            gallery = None if data.gallery is None else self._embed(model, "gallery", data.gallery)
            self.say("searching")
            searched = None if data.gallery is None else Gallery(gallery, data.gallery.labels)
            metrics = metrics_of(queries, data.test, recall_at, searched)
        return queries, gallery, metrics

    def _embed(self, model: Model, name: str, images: LabeledImages) -> Tensor:
        self.say(f"embedding {len(images):,} {name} images of {model.path}")
        network, workers = model.network.to(self.place), usual_workers(model.config.data.workers)
        return embed(network, images, self.place, model.preprocessing, workers, self.progress).cpu()


def _baseline(name: str, path: Path, which: str, recall_at: Sequence[int], measure: _Measure) -> Run:
    """A run's test metrics: its summary's where they belong to the same checkpoint; otherwise they are measured now."""
    summary = read_summary(path) if which == "last" else None
    if summary is not None and all(f"recall@{k}" in summary["test"] for k in recall_at):
        return Run(name, summary["loss"], summary["steps"], summary["test"], _records(path), summary["data_digest"])
    model, records = load_model(path, which), _records(path)
    *_, metrics = measure(model, measure.data(model), recall_at)
    return Run(name, model.config.loss_title, model.step, metrics, records, model.data_digest)


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return read_records(path) if path.exists() else []


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or the whole path where two last parts are equal."""
    short = [Path(os.path.realpath(path)).name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
