"""A run records whether it rotates images by EXIF, and an old run, which could not, goes on as it began."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from stopped_runs import interrupted

from gcahng.data import load_data
from gcahng.models.model_file import load_model
from gcahng.runs.checkpoint import checkpoint_path, load_checkpoint
from gcahng.train import BackboneConfig, DataConfig, TrainConfig, fit, resume

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from trees import make_cub200, make_folder


@pytest.fixture(autouse=True)
def the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcahng.train.loop.load_data", load_data)
    monkeypatch.setattr("gcahng.train.session.draw_pictures", lambda *_: None)  # pictures take longest


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run on class folders whose images have each another orientation."""
    root = make_folder(tmp_path / "folder", classes=8, images=4, size=16)
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        Image.fromarray(np.asarray(Image.open(path))).save(path, exif=exif)
    data = DataConfig(
        "folder",
        str(root),
        val_classes=0,
        classes_per_batch=3,
        samples_per_class=2,
        image_size=16,
        resize=20,
        workers=0,
    )
    return TrainConfig(
        loss="npair", steps=4, steps_per_epoch=4, eval_every=4, log_every=1, device="cpu", threads=1,
        out=str(tmp_path / "run"), data=data, backbone=BackboneConfig(embedding_dim=8, width=4),
    )  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoint_path(run, "last"))["model"]


def recorded(run: Path) -> list[object]:
    """What config.yaml, the checkpoint and the weights' file say."""
    values = yaml.safe_load((run / "config.yaml").read_text())["data"]["exif_rotate"]
    model = load_model(run / "checkpoints" / "last.safetensors")
    return [values, load_model(run).config.data.exif_rotate, model.config.data.exif_rotate]


def test_an_old_run_goes_on_without_rotation_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    off = replace(config, data=replace(config.data, exif_rotate=False))
    fit(replace(config, out=str(tmp_path / "on")))
    fit(replace(off, out=str(tmp_path / "off")))
    assert recorded(tmp_path / "on") == [True] * 3 and recorded(tmp_path / "off") == [False] * 3
    rotated, stored = weights(tmp_path / "on"), weights(tmp_path / "off")
    assert not all(torch.equal(rotated[name], stored[name]) for name in stored), "rotation makes another run"

    run = interrupted(off, 2)
    for path in (run / "checkpoints").glob("*.pt"):  # as a version without the option wrote it
        state = torch.load(path, weights_only=True)
        del state["config"]["data"]["exif_rotate"]
        torch.save(state, path)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  exif_rotate: false\n", ""))
    assert "exif_rotate" not in (run / "config.yaml").read_text() and load_model(run).config.data.exif_rotate is False
    resume(run)
    resumed = weights(run)
    assert all(torch.equal(resumed[name], stored[name]) for name in stored)

    for path in (run / "checkpoints").glob("*.pt"):
        path.unlink()  # killed before its first checkpoint: only config.yaml is there
    (run / "summary.json").unlink()
    resume(run)
    assert all(torch.equal(weights(run)[name], stored[name]) for name in stored)


def test_a_run_on_a_published_set_records_that_it_is_off(config: TrainConfig, tmp_path: Path) -> None:
    root = make_cub200(tmp_path / "cub200", classes=8, images=4, size=16)
    run = Path(str(config.out))
    fit(replace(config, steps=1, data=replace(config.data, name="cub200", root=str(root))))
    assert recorded(run) == [False] * 3
