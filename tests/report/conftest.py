"""Small runs on made-up images, with class names and paths that a careless page would trip over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from gcahng.data import DataSplits, ImageFiles, ImageSet
from gcahng.train import BackboneConfig, DataConfig, GcaConfig, TrainConfig, fit

HOSTILE = ("<script>alert(1)</script>", 'a"quote\' onload="alert(2)', "</script><!--", "&amp; <b>bold", "plain")
SIDE = 32


@dataclass(frozen=True)
class Runs:
    """A run and a baseline of it, and the data that both saw."""

    run: Path
    baseline: Path
    data: DataSplits


def drawn(classes: int, per_class: int, seed: int, names: tuple[str, ...] = ()) -> ImageSet:
    """(N, 32, 32): a pattern of blocks for each class, noise for each image."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.rand(classes, 1, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.rand(classes, per_class, SIDE, SIDE, generator=generator)
    images = (255 * (0.6 * pattern + 0.4 * noise)).to(torch.uint8).flatten(0, 1)
    names = names + tuple(f"class {i}" for i in range(len(names), classes))
    return ImageSet(images, torch.arange(classes).repeat_interleave(per_class), names)


def made_up_data() -> DataSplits:
    return DataSplits(drawn(6, 4, 1), drawn(4, 4, 2), drawn(9, 5, 3, HOSTILE), "0" * 16)


def small_config(out: Path, loss: str = "gca_hng") -> TrainConfig:
    return TrainConfig(
        loss=loss,  # type: ignore[arg-type]
        steps=6,
        steps_per_epoch=3,
        eval_every=3,
        log_every=2,
        device="cpu",
        threads=1,
        out=str(out),
        data=DataConfig(classes_per_batch=4, samples_per_class=3, image_size=SIDE, resize=SIDE),
        backbone=BackboneConfig(embedding_dim=16, width=4),
        gca=GcaConfig(heads=2),
    )


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    data = made_up_data()
    run, baseline = folder / 'run "1" <b>&', folder / "base'line"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gcahng.train.loop.load_data", lambda config: data)
        for name in ("plot_curves", "plot_retrieval_grid"):  # pictures that nobody looks at here
            patch.setattr(f"gcahng.runs.plots.{name}", lambda *arguments, **options: None)
        fit(small_config(run))
        fit(small_config(baseline, "npair"))
    return Runs(run, baseline, data)


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> Callable[[DataSplits], None]:
    """Lets reports see these data."""

    def show(data: DataSplits) -> None:
        monkeypatch.setattr("gcahng.report.contents.load_data", lambda config: data)

    return show


@pytest.fixture(autouse=True)
def made_up_data_everywhere(runs: Runs, see: Callable[[DataSplits], None]) -> Iterator[None]:
    see(runs.data)
    yield


@pytest.fixture(scope="session")
def file_data(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    """Queries and a gallery as files, in color, wider than high; the last query has nothing right to find."""
    root = tmp_path_factory.mktemp("files")
    made = drawn(6, 4, 4, HOSTILE)
    paths = []
    for i, (gray, label) in enumerate(zip(made.images, made.labels.tolist(), strict=True)):
        name = f"item '{label}' \"{i}\" <i>&.png"
        color = torch.stack([gray, gray.flip(0), 255 - gray], dim=2)
        Image.fromarray(color.repeat(3, 4, 1).numpy()).save(root / name)
        paths.append(name)
    files = ImageFiles(root, tuple(paths), made.labels, made.class_names)
    places = torch.arange(len(files))
    gallery = files.subset(places[(places % 4 != 0) & (made.labels != 5)])
    return replace(made_up_data(), test=files.subset(places[places % 4 == 0]), gallery=gallery, recall_at=(1, 3))
