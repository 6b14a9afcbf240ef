"""data.exif_rotate: what it means for each data set, and that it belongs to the identity of the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data_sets import MAKERS, config_of

from gcahng.config import TrainConfig, config_from_dict, config_of_run, config_to_dict
from gcahng.data import Preprocessing, build_batches, evaluation_batches, load_data
from gcahng.data.config import DataConfig


@pytest.mark.parametrize("tree", MAKERS)
def test_on_for_ones_own_images_and_off_for_the_published_sets(tree: str, tmp_path: Path) -> None:
    name, make = MAKERS[tree]
    config = config_of(name, make(tmp_path / "data"))
    own = name in ("folder", "csv")
    assert config.exif_rotate is None and config.rotates == own == config.decided().exif_rotate
    for asked, rotates in ((None, own), (True, True), (False, False)):
        data = load_data(replace(config, exif_rotate=asked))
        assert {split.exif_rotate for split in (data.train, data.test, data.gallery) if split} == {rotates}


def _lying(root: Path) -> Path:
    """Class folders whose images lie on their side: stored 20 x 40, with the left half white, upright 40 x 20."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    for split, c in (("train", "a"), ("train", "b"), ("test", "c"), ("test", "d")):
        (root / split / c).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(pixels).save(root / split / c / f"{i}.png", exif=exif)
    return root


@pytest.mark.parametrize("exif_rotate", [True, False])
def test_training_and_evaluation_see_upright_images(exif_rotate: bool, tmp_path: Path) -> None:
    config = config_of(
        "folder", _lying(tmp_path), exif_rotate=exif_rotate, image_size=20, crop_scale_min=1.0, workers=0,
        classes_per_batch=2, samples_per_class=2,
    )  # fmt: skip
    data = load_data(config)
    image = next(evaluation_batches(data.test, Preprocessing(20, 20), 1))[0].float() / 255
    top, left = image[:, :10], image[:, :, :10]
    assert (top.mean().round(decimals=1) == 1) == exif_rotate
    assert (left.mean().round(decimals=1) == 1) != exif_rotate
    batches = build_batches(config, data.train, seed=0, device=torch.device("cpu"))
    for image in batches.batch(0)[0].float() / 255:  # a crop changes where the edge is, and not its direction
        rows, columns = image.mean(dim=(0, 2)), image.mean(dim=(0, 1))
        across, along = (rows, columns) if exif_rotate else (columns, rows)
        assert across.max() - across.min() > 0.9 and along.max() - along.min() < 0.1


def test_it_belongs_to_the_datas_identity(tmp_path: Path) -> None:
    rows = [f"{i}.jpg,{'ab'[i // 2]},{'train' if i < 2 else 'test'}" for i in range(4)]
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(b"x" * (i + 1))
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    config = DataConfig(name="csv", csv=str(tmp_path / "list.csv"), val_classes=0)
    on, off = load_data(config), load_data(replace(config, exif_rotate=False))
    assert off.digest == "31dd8dc33b8d7446", "the digest of the files before there was a choice"
    assert on.digest not in (off.digest,) and on.listing == off.listing
    assert on.digest == load_data(replace(config, exif_rotate=True)).digest


def test_a_run_from_before_the_option_was_off() -> None:
    config = TrainConfig(data=DataConfig(name="folder", root="photos"))
    values = config_to_dict(config)
    assert config_from_dict(values) == config and config_of_run(values) == config
    del values["data"]["exif_rotate"]
    assert config_of_run(values).data == replace(config.data, exif_rotate=False)
    assert config_from_dict(values).data.exif_rotate is None, "the options of a new run"
