"""Every kind of image becomes RGB, and one that cannot be read is an error with its path."""

from __future__ import annotations

import os
import pickle
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image

from gcahng.data import (
    ImageFiles,
    ImageSet,
    Preprocessing,
    UnreadableImage,
    evaluation_batches,
    read_rgb,
    usual_workers,
)
from gcahng.data.workers import read_in_order
from gcahng.errors import UserError

RED, GRAY = (200, 40, 40), (90, 90, 90)


def files_below(root: Path) -> ImageFiles:
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    return ImageFiles(root, tuple(paths), torch.zeros(len(paths), dtype=torch.int64), ("all",))


@pytest.fixture
def seven(tmp_path: Path) -> ImageFiles:
    for i in range(7):
        trees.write_image(tmp_path / f"{i}.png", i)
    return files_below(tmp_path)


def _palette() -> Image.Image:
    return Image.new("RGB", (8, 6), RED).quantize(4)


def _transparent_palette() -> Image.Image:
    image = _palette()
    image.info["transparency"] = image.getpixel((0, 0))
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (Image.new("RGB", (8, 6), RED), "png", RED),
        (Image.new("L", (8, 6), 90), "jpg", GRAY),
        (Image.new("1", (8, 6), 1), "png", (255, 255, 255)),
        (Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "jpg", (255, 0, 0)),
        (_palette(), "png", RED),
        (_transparent_palette(), "png", (255, 255, 255)),
        (Image.new("RGBA", (8, 6), (*RED, 255)), "png", RED),
        (Image.new("RGBA", (8, 6), (0, 0, 0, 0)), "png", (255, 255, 255)),
        (Image.new("LA", (8, 6), (0, 51)), "png", (204, 204, 204)),
        (Image.fromarray(np.full((6, 8), 90 * 257, np.uint16)), "png", GRAY),
        (Image.fromarray(np.full((6, 8), 90 * 257, np.uint16)), "tif", GRAY),
    ],
    ids=["RGB", "gray", "one bit", "CMYK", "palette", "transparent palette", "alpha", "transparent", "gray alpha",
         "16 bits", "16 bits, TIFF"],
)  # fmt: skip
def test_every_mode_becomes_rgb(
    image: Image.Image, suffix: str, expected: tuple[int, int, int], tmp_path: Path
) -> None:
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    read = read_rgb(path)
    assert read.mode == "RGB" and read.size == (8, 6)
    assert np.abs(np.asarray(read).astype(int) - expected).max() <= (2 if suffix == "jpg" else 0)


def test_pixels_of_32_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((6, 8), 0.5, np.float32)).save(tmp_path / "image.tif")
    with pytest.raises(UnreadableImage, match="image.tif cannot be read as an image: it has F pixels of 32 bits"):
        read_rgb(tmp_path / "image.tif")


def test_what_pillow_warns_of_is_not_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Pillow warns of metadata that it cannot read, in two lines for each image."""
    path = tmp_path / "image.jpg"
    cut_short = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01"
    Image.new("RGB", (20, 20)).save(path, exif=cut_short)
    with pytest.warns(UserWarning, match="Corrupt EXIF data"), Image.open(path) as image:
        image.getexif()
    recwarn.clear()
    assert read_rgb(path, exif_rotate=True).size == (20, 20)
    assert not recwarn.list


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "folder"])
def test_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    trees.write_image(path, size=64)
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "text": b"<html>404</html>", "truncated": whole[: len(whole) // 2]}[damage])
    with pytest.raises(UnreadableImage, match=r"image.jpg cannot be read as an image: \w") as caught:
        read_rgb(path)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.path, again.reason, str(again)) == (path, caught.value.reason, str(caught.value))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches(workers: int, seven: ImageFiles) -> None:
    state = torch.get_rng_state()
    done: list[int] = []
    batches = list(evaluation_batches(seven, Preprocessing(20, 16), 3, workers, done.append))
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 16, 16), (3, 3, 16, 16), (1, 3, 16, 16)]
    assert done == [3, 3, 1] and all(batch.dtype == torch.uint8 for batch in batches)
    assert torch.equal(torch.get_rng_state(), state), "a training run's numbers would depend on its evaluations"
    image = read_rgb(seven.file(4))
    scale = 20 / min(image.size)
    resized = image.resize(tuple(int(side * scale) for side in image.size), Image.Resampling.BILINEAR)
    left, top = (round((side - 16) / 2) for side in resized.size)
    expected = np.asarray(resized.crop((left, top, left + 16, top + 16))).transpose(2, 0, 1)
    assert np.array_equal(batches[1][1].numpy(), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_stops_at_an_unreadable_image(workers: int, seven: ImageFiles) -> None:
    seven.file(4).write_bytes(seven.file(4).read_bytes()[:300])
    batches = evaluation_batches(seven, Preprocessing(20, 16), 3, workers)
    next(batches)
    with pytest.raises(UnreadableImage) as caught:
        next(batches)
    assert caught.value.path == seven.file(4) and "\n" not in str(caught.value)


def test_images_in_memory_are_given_out_as_they_are() -> None:
    images = ImageSet(torch.arange(5, dtype=torch.uint8)[:, None, None].expand(5, 4, 4), torch.zeros(5), ("all",))
    done: list[int] = []
    batches = list(evaluation_batches(images, Preprocessing(), 2, progress=done.append))
    assert torch.equal(torch.cat(batches), images.images) and done == [2, 2, 1]


def test_crop_larger_than_resize(seven: ImageFiles) -> None:
    with pytest.raises(UserError, match="resize is 16 and crop is 20; resize must be at least crop"):
        next(evaluation_batches(seven, Preprocessing(16, 20), 3))


def test_usual_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcahng.machine.group_cpus", lambda *_: [])  # whatever this machine grants
    for cores, expected in ((1, 0), (2, 1), (9, 8), (64, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert usual_workers(None) == expected
    assert usual_workers(0) == 0 and usual_workers(12) == 12


class _Killed:
    """Reader whose process is killed at job 1, as by the system when memory runs out."""

    def __getitem__(self, job: int) -> int:
        if job == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return job


def test_killed_worker_is_one_line() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = read_in_order(_Killed(), range(3), 1)
        with pytest.raises(UserError, match="data.workers is 1 and a process that reads images was killed"):
            list(results)


class _Bug:
    def __getitem__(self, job: int) -> int:
        raise RuntimeError("a bug")


@pytest.mark.parametrize("workers", [0, 1])
def test_bug_in_a_reader_is_not_hidden(workers: int) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        list(read_in_order(_Bug(), range(3), workers))


def test_processes_that_cannot_be_started_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", start)
    with pytest.raises(UserError, match="data.workers is 3, and so many processes .* cannot be started: Cannot alloc"):
        list(read_in_order(range(5), range(3), 3))  # type: ignore[arg-type]
