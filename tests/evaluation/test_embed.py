"""Embeddings of many images: in order, equal to one pass in memory, and continued wherever a call was stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import draw_folder

import gcahng
from gcahng.data import DataSplits, ImageFiles, Preprocessing, UnreadableImage
from gcahng.errors import UserError
from gcahng.evaluation import partial_embeddings
from gcahng.evaluation.embed import EmbedOptions, embed, embed_to_file, fingerprint
from gcahng.evaluation.image_inputs import files_images
from gcahng.models.model_file import Model, load_model
from gcahng.retrieval.embeddings import read_embeddings

PIL_Image = pytest.importorskip("PIL.Image")
ROOT = Path(gcahng.__file__).parents[1]
SMALL = Preprocessing(32, 32)
OPTIONS = EmbedOptions(device="cpu", batch_size=4, workers=0)


@pytest.fixture
def model(finished_run: tuple[Path, dict[str, Any]]) -> Model:
    return load_model(finished_run[0])


def run(model: Model, folder: Path, out: Path, **fields: Any):
    images, items = files_images([folder], labels_from_folders=True)
    options = EmbedOptions(**{**vars(OPTIONS), **fields})
    return embed_to_file(model, images, items, out, preprocessing=SMALL, options=options)


def test_a_data_set_in_memory_is_embedded_as_by_eval(model: Model, small_data: DataSplits, tmp_path: Path) -> None:
    from gcahng.evaluation.image_inputs import dataset_images

    images, items = dataset_images(model.config.data, "test")
    result = embed_to_file(model, images, items, str(tmp_path / "x.safetensors"), options=EmbedOptions(device="cpu"))
    expected = embed(model.network, small_data.test, torch.device("cpu"))
    assert torch.equal(result.embeddings.embeddings, expected)
    found = read_embeddings(tmp_path / "x.safetensors")
    assert torch.equal(found.embeddings, expected) and torch.equal(found.items.labels, small_data.test.labels)
    assert found.items.class_name(13) == small_data.test.class_names[1] and found.items.names[13].endswith("(image 13)")
    assert found.items.path(0) is None and found.items.place(5)[1] == 5
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder(model: Model, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "pictures")
    found = run(model, folder, tmp_path / "x.npy").embeddings
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert list(found.items.names) == files and found.items.path(3) == folder / files[3]
    assert found.items.class_names == ("c0", "c1", "c2") and found.items.labeled
    images = ImageFiles(folder, tuple(files), found.items.labels, found.items.class_names)
    expected = torch.cat(
        [
            embed(model.network, images.subset(torch.arange(i, min(i + 4, 21))), torch.device("cpu"), SMALL)
            for i in range(0, 21, 4)
        ]
    )
    assert torch.equal(found.embeddings, expected)
    assert found.model is not None and (found.model.resize, found.model.crop) == (32, 32)


class Stopped(Exception):
    pass


def test_rows_reach_the_disk_before_they_are_noted(
    small_data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    note = partial_embeddings.write_json
    monkeypatch.setattr(os, "fsync", lambda file: events.append(("synced", os.fstat(file).st_size)))
    monkeypatch.setattr(
        partial_embeddings,
        "write_json",
        lambda path, values: (events.append(("noted", values["rows"])), note(path, values)),
    )
    with partial_embeddings.PartialRows(tmp_path / "x.npy", partial_embeddings.ImagesKey("", small_data.train)) as part:
        part.append(torch.ones(2, 3), [], 2)
        part.note()
        assert events[:2] == [("synced", 2 * 3 * 4), ("noted", 2)]


@pytest.mark.parametrize("stop_after", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("killed", [False, True])
def test_a_stopped_try_goes_on(
    stop_after: int, killed: bool, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any batch the call is stopped, or killed while it writes rows; the bits at the end are the same."""
    folder = draw_folder(tmp_path / "pictures")
    whole = run(model, folder, tmp_path / "whole.npy").embeddings
    images, items = files_images([folder], labels_from_folders=True)
    out = tmp_path / "x.npy"
    batches = 0
    embed_batch = model.network.forward

    def stop(batch: Any) -> torch.Tensor:
        nonlocal batches
        if batches == stop_after:
            raise Stopped
        batches += 1
        return embed_batch(batch)

    with monkeypatch.context() as patch:
        patch.setattr(model.network, "forward", stop)
        if killed:
            patch.setattr(partial_embeddings, "_NOTE_EVERY", 0.0)
            patch.setattr(partial_embeddings.PartialRows, "__exit__", lambda self, *_: self._file.close())
        if stop_after == 6:  # all batches are there, and the file is not
            patch.setattr("gcahng.evaluation.embed_job.write_embeddings", lambda *_: stop(images))
        with pytest.raises(Stopped):
            embed_to_file(model, images, items, out, preprocessing=SMALL, options=OPTIONS)
    assert not out.exists() and Path(f"{out}.part").exists()
    if killed:
        with open(f"{out}.part", "ab") as file:
            file.write(b"half a row")
    seen: list[tuple[int, int]] = []
    result = embed_to_file(
        model, images, items, out, preprocessing=SMALL, options=OPTIONS, progress=lambda *at: seen.append(at)
    )
    assert result.resumed == min(4 * stop_after, 21)
    assert seen == [(min(4 * i, 21), 21) for i in range(stop_after + 1, 7)]
    assert torch.equal(result.embeddings.embeddings, whole.embeddings)
    assert result.embeddings.items.names == whole.items.names
    assert not list(tmp_path.glob("*.part*"))


def test_an_unreadable_image_stops_with_its_path_or_is_left_out(model: Model, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "pictures")
    whole = run(model, folder, tmp_path / "whole.npy").embeddings
    for name in ("c0/5.png", "c1/1.png", "c1/2.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(UnreadableImage, match=r"pictures/c0/5\.png cannot be read as an image"):
        run(model, folder, tmp_path / "x.npy")
    assert json.loads((tmp_path / "x.npy.part.json").read_text())["rows"] == 4
    result = run(model, folder, tmp_path / "x.npy", skip_unreadable=True)  # the same file goes on
    assert result.skipped == ["c0/5.png", "c1/1.png", "c1/2.png"] and result.resumed == 4
    kept = [i for i, name in enumerate(whole.items.names) if name not in result.skipped]
    found = result.embeddings
    assert found.items.names == tuple(whole.items.names[i] for i in kept)
    assert torch.equal(found.items.labels, whole.items.labels[kept])
    torch.testing.assert_close(found.embeddings, whole.embeddings[kept])  # batches are smaller: sums may round apart
    again = run(model, folder, tmp_path / "x.npy", skip_unreadable=True)
    assert again.resumed == len(kept) and again.skipped == result.skipped
    with pytest.raises(UserError, match=r"x\.npy exists, without 3 images that could not be read, such as c0/5\.png"):
        run(model, folder, tmp_path / "x.npy")


def test_a_repaired_image_lets_it_go_on(model: Model, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "pictures")
    whole = run(model, folder, tmp_path / "whole.npy").embeddings
    content = (folder / "c1/3.png").read_bytes()
    (folder / "c1/3.png").write_bytes(b"damaged")
    with pytest.raises(UnreadableImage):
        run(model, folder, tmp_path / "x.npy")
    (folder / "c1/3.png").write_bytes(content)
    result = run(model, folder, tmp_path / "x.npy")
    assert result.resumed == 8 and torch.equal(result.embeddings.embeddings, whole.embeddings)


def test_none_readable(model: Model, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 5 images can be read; the first is 0.png"):
        run(model, tmp_path / "pictures", tmp_path / "x.npy", skip_unreadable=True)


def test_rows_of_something_else_are_not_gone_on_with(model: Model, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "pictures")
    (folder / "c2/6.png").write_bytes(b"damaged")
    out = tmp_path / "x.npy"
    with pytest.raises(UnreadableImage):
        run(model, folder, out)
    changed = folder / "c0/0.png"
    os.utime(changed, (1, 1))
    with pytest.raises(
        UserError, match=r"x\.npy\.part was made from other images, another network or other options; remove"
    ):
        run(model, folder, out)
    os.truncate(f"{out}.part", 10)
    Path(f"{out}.part.json").write_text('{"key": 3')
    with pytest.raises(UserError, match=r"x\.npy\.part\.json is damaged; remove it and x\.npy\.part"):
        run(model, folder, out)


def test_what_tells_images_apart(small_data: DataSplits, tmp_path: Path) -> None:
    def key(images: Any, about: str = "", count: int = 6) -> str:
        return partial_embeddings.ImagesKey(about, images).of_first(count)

    images = small_data.train.subset(torch.arange(6))
    drawn, named = replace(images, images=images.images.clone()), replace(images, labels=images.labels.clone())
    drawn.images[4, 0, 0] += 1
    named.labels[4] += 1
    keys = [key(images), key(images, "of another network"), key(images, count=5), key(drawn), key(named)]
    assert len(set(keys)) == 5
    assert key(images, count=4) == key(drawn, count=4) == key(named, count=4)

    folder = draw_folder(tmp_path)
    files = ImageFiles(folder, tuple(f"c0/{i}.png" for i in range(6)), torch.zeros(6, dtype=torch.int64), ("a", "b"))
    other = replace(files, labels=torch.tensor([0, 0, 0, 0, 1, 0]))
    assert key(files) == key(files) != key(other) and key(files, count=4) == key(other, count=4)


@pytest.mark.parametrize(
    "change", [{"batch_size": 3}, {"preprocessing": Preprocessing(40, 32)}, {"preprocessing": Preprocessing(32, 24)}]
)
def test_other_options_make_another_file(change: dict[str, Any], model: Model, tmp_path: Path) -> None:
    """Batches of other sizes may round differently, and other squares are other images."""
    folder = draw_folder(tmp_path / "pictures", classes=1, images=2)
    images, items = files_images([folder])
    options = {"preprocessing": SMALL} | change
    size = options.pop("batch_size", OPTIONS.batch_size)
    embed_to_file(model, images, items, tmp_path / "x.npy", preprocessing=SMALL, options=OPTIONS)
    with pytest.raises(UserError, match="exists and was made from other images, another network or other options"):
        embed_to_file(model, images, items, tmp_path / "x.npy", options=replace(OPTIONS, batch_size=size), **options)


def test_rows_lost_from_the_part_are_noticed(model: Model, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "pictures")
    (folder / "c2/6.png").write_bytes(b"damaged")
    with pytest.raises(UnreadableImage):
        run(model, folder, tmp_path / "x.npy")
    os.truncate(tmp_path / "x.npy.part", 10)
    with pytest.raises(UserError, match=r"x\.npy\.part is shorter than x\.npy\.part\.json says"):
        run(model, folder, tmp_path / "x.npy")


@pytest.mark.processes
def test_only_one_process_writes_a_file(model: Model, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "pictures")
    code = "import fcntl, sys, time; file = open(sys.argv[1], 'ab'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
    code += "print('held', flush=True); time.sleep(600)"
    part = tmp_path / "x.npy.part"
    other = subprocess.Popen([sys.executable, "-c", code, str(part)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"x\.npy\.part is being written by another process; wait for its end"):
            run(model, folder, tmp_path / "x.npy")
    finally:
        other.kill()
        other.communicate()
    assert run(model, folder, tmp_path / "x.npy").resumed == 0 and not part.exists()


def test_a_finished_file_stays(model: Model, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "pictures")
    out = tmp_path / "x.safetensors"
    run(model, folder, out)
    before = out.read_bytes()
    assert run(model, folder, out).resumed == 21 and out.read_bytes() == before
    draw_folder(tmp_path / "others", seed=1)
    with pytest.raises(UserError, match=r"x\.safetensors exists and was made from other images"):
        run(model, tmp_path / "others", out)
    with pytest.raises(UserError, match="batch_size is 0; it must be a whole number of at least 1"):
        run(model, folder, tmp_path / "y.npy", batch_size=0)


def test_the_fingerprint_is_the_networks(model: Model, finished_run: tuple[Path, dict[str, Any]]) -> None:
    before = fingerprint(model)
    assert before == fingerprint(load_model(finished_run[0]))
    with torch.no_grad():
        model.network.head[1].bias[0] += 1e-6
    assert fingerprint(model) != before


def test_the_fingerprint_is_of_what_is_done_with_the_weights_too(model: Model) -> None:
    found = {fingerprint(model)}
    for change in ({"name": "torchvision:resnet50"}, {"pool": "avg+max"}, {"embedding_dim": 8}):
        config = replace(model.config, backbone=replace(model.config.backbone, **change))
        found.add(fingerprint(replace(model, config=config)))
    for inputs, outputs in ((2, 3), (3, 2)):  # the same bytes
        network = torch.nn.Linear(inputs, outputs, bias=False)
        torch.nn.init.zeros_(network.weight)
        found.add(fingerprint(replace(model, network=network)))
    assert len(found) == 6


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".parquet"])
def test_normalized_embeddings(suffix: str, model: Model, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "pictures")
    plain = run(model, folder, tmp_path / f"plain{suffix}").embeddings
    unit = run(model, folder, tmp_path / f"unit{suffix}", normalize=True).embeddings
    rows = plain.embeddings.double()
    assert torch.equal(unit.embeddings, (rows / rows.norm(dim=1, keepdim=True)).float())
    assert plain.model is not None and unit.model == replace(plain.model, normalized=True)
    for out, normalize in ((f"plain{suffix}", True), (f"unit{suffix}", False)):
        with pytest.raises(UserError, match="exists and was made from other images, another network or other options"):
            run(model, folder, tmp_path / out, normalize=normalize)


def test_a_row_of_zeros_has_no_direction(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda batch: 0 * forward(batch))
    with pytest.raises(UserError, match="embeddings has norm 0.0 in row 0; it must be positive and finite with --norm"):
        run(model, draw_folder(tmp_path / "pictures"), tmp_path / "x.npy", normalize=True)


@pytest.mark.parametrize("noted_crc", [True, False])
def test_a_flipped_bit_in_the_part_is_found(
    noted_crc: bool, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note of an earlier version has no checksum, and is continued from."""
    folder = draw_folder(tmp_path / "pictures")
    whole = run(model, folder, tmp_path / "whole.npy").embeddings.embeddings
    stop_after(model, 3, monkeypatch, lambda: run(model, folder, tmp_path / "x.npy"))
    note, part = tmp_path / "x.npy.part.json", tmp_path / "x.npy.part"
    values, rows = json.loads(note.read_text()), bytearray(part.read_bytes())
    assert values["rows"] == 12 and len(rows) == 12 * whole.shape[1] * 4
    if noted_crc:
        part.write_bytes(bytes([rows[0] ^ 1]) + rows[1:])
        before = note.read_bytes()
        with pytest.raises(UserError, match=r"x.npy.part is damaged: the checksum of its rows is .*; remove it and x"):
            run(model, folder, tmp_path / "x.npy")
        assert note.read_bytes() == before
        part.write_bytes(rows)
    else:
        del values["crc32"]
        note.write_text(json.dumps(values))
    result = run(model, folder, tmp_path / "x.npy")
    assert result.resumed == 12 and torch.equal(result.embeddings.embeddings, whole)


def stop_after(model: Model, batches: int, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> None:
    """Stop a call after some batches."""
    forward, done = model.network.forward, 0

    def stop(batch: Any) -> torch.Tensor:
        nonlocal done
        if done == batches:
            raise Stopped
        done += 1
        return forward(batch)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(model.network, "forward", stop)
        call()
