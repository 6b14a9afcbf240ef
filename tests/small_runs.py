"""Fixtures: a small part of glyphs, and runs on it that the tests of several rooms look at (a pytest plugin)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from shared_files import made_once

if TYPE_CHECKING:  # this is imported before any test: only runs need to import gcahng.train
    from gcahng.data import DataSplits, ImageSet
    from gcahng.train import TrainConfig


def first_classes(images: ImageSet, count: int) -> ImageSet:
    from gcahng.data import ImageSet

    chosen = images.labels < count
    return ImageSet(images.images[chosen], images.labels[chosen], images.class_names[:count])


def few_glyphs() -> DataSplits:
    """12 training, 6 validation and 40 test classes. To draw all others takes several seconds: one process does."""
    import torch

    from gcahng.data import load_glyphs

    def draw(path: Path) -> None:
        whole = load_glyphs(train_classes=12, val_classes=6)
        torch.save(replace(whole, test=first_classes(whole.test, 40)), path)

    return torch.load(made_once("glyphs.pt", draw), weights_only=False)


def make_noise(root: Path) -> None:
    """A data set of few images, for commands in a process of their own: it is read and searched in no time."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for c in range(10):
        where = root / ("train" if c < 7 else "test") / f"class_{c}"
        where.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(draw.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(where / f"{i}.png")


@pytest.fixture(scope="session")
def small_data() -> DataSplits:
    """Those of few_glyphs."""
    return few_glyphs()


@contextmanager
def _every_run_sees(data: DataSplits) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("train.loop", "evaluation.evaluate", "evaluation.image_inputs", "evaluation.search_plot"):
            patch.setattr(f"gcahng.{module}.load_data", lambda config: data)
        yield


@pytest.fixture
def runs_see_small_data(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every run of a test that is not slow sees `small_data`, whatever its config says of glyphs."""
    if request.node.get_closest_marker("slow"):
        yield
    else:
        with _every_run_sees(request.getfixturevalue("small_data")):
            yield


@pytest.fixture(scope="session")
def small_config() -> Callable[..., TrainConfig]:
    """A config of a few steps on small batches; keyword arguments replace fields."""
    from gcahng.train import BackboneConfig, DataConfig, GcaConfig, TrainConfig

    def make(**fields: Any) -> TrainConfig:
        return TrainConfig(
            **{
                "steps": 6,
                "steps_per_epoch": 3,
                "eval_every": 4,
                "log_every": 2,
                "device": "cpu",
                "threads": 1,
                "data": DataConfig(classes_per_batch=4, samples_per_class=3, train_classes=12, val_classes=6),
                "backbone": BackboneConfig(embedding_dim=16, width=4),
                "gca": GcaConfig(heads=2),
            }
            | fields
        )

    return make


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, small_config: Callable[..., TrainConfig], small_data: DataSplits
) -> tuple[Path, dict[str, Any]]:
    """The folder and the summary of a run with the default loss."""
    from gcahng.train import fit

    out = tmp_path_factory.mktemp("runs") / "finished"
    with _every_run_sees(small_data):
        return out, fit(small_config(out=str(out)))


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plots take longer than such a run, and have tests of their own."""
    from killed_runs import no_pictures

    monkeypatch.setattr("gcahng.train.session.draw_pictures", no_pictures)


@pytest.fixture(scope="session")
def whole(
    tmp_path_factory: pytest.TempPathFactory, small_config: Callable[..., TrainConfig], small_data: DataSplits
) -> Path:
    """A run that was never interrupted: 8 steps, epochs of 3, evaluations after 3, 6 and 8."""
    from killed_runs import no_pictures

    from gcahng.train import fit

    out = tmp_path_factory.mktemp("runs") / "whole"
    with _every_run_sees(small_data), pytest.MonkeyPatch.context() as patch:
        patch.setattr("gcahng.train.session.draw_pictures", no_pictures)
        fit(small_config(steps=8, eval_every=3, keep_every=4, out=str(out)))
    return out


@pytest.fixture
def config_of_whole(small_config: Callable[..., TrainConfig], tmp_path: Path) -> TrainConfig:
    return small_config(steps=8, eval_every=3, keep_every=4, out=str(tmp_path / "run"))
