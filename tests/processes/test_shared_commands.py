"""eval, embed and index in several processes give what one process gives, bit for bit, and print it once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from shared_commands import COUNT, process, run_all

from gcahng.evaluation import embed
from gcahng.retrieval.embeddings import read_embeddings
from gcahng.train import BackboneConfig, DataConfig, TrainConfig, fit

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a few image files, and what the commands left in one process and in several."""
    folder = tmp_path_factory.mktemp("shared")
    for c in range(6):
        where = folder / "tree" / ("train" if c < 2 else "test") / f"class_{c}"
        where.mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (40, 40), (40 * c, 50 * i, 9 * c * i % 256)).save(where / f"{i}.png")
    (folder / "damaged").mkdir()
    for i in range(11):
        path = folder / "damaged" / f"{i:02}.png"
        Image.new("RGB", (40, 40), (20 * i, 9, 5)).save(path)
        if i in (3, 4, 5, 8):  # one batch as a whole
            path.write_bytes(b"no image")
    before = os.getcwd()
    os.chdir(folder)
    try:
        batch = {"classes_per_batch": 2, "samples_per_class": 2, "image_size": 32, "resize": 32}
        data = DataConfig(name="folder", root="tree", val_classes=0, workers=0, **batch)
        backbone = BackboneConfig(embedding_dim=16, width=4)
        fit(TrainConfig(loss="npair", steps=2, out="run", device="cpu", threads=1, data=data, backbone=backbone))
        for out in ("one", "several"):
            Path(out).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embed, "EVAL_BATCH", 4)
            Path("one.json").write_text(json.dumps(run_all("one")))
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        mp.spawn(process, (str(folder), store.port), nprocs=COUNT)
    finally:
        os.chdir(before)
    return folder


def said(folder: Path, name: str) -> tuple[Any, list[Any]]:
    """Status, output and messages of a command in one process, and in each of several."""
    one = json.loads((folder / "one.json").read_text())[name]
    return one, [json.loads((folder / f"{rank}.json").read_text())[name] for rank in range(COUNT)]


def test_metrics_are_those_of_one_process(folder: Path) -> None:
    one, several = (json.loads((folder / out / "eval.json").read_text()) for out in ("one", "several"))
    assert one == several and one["test"]["queries"] == 20


@pytest.mark.parametrize("file", ["e.safetensors", "s.safetensors"])
def test_embeddings_have_the_bits_of_one_process(file: str, folder: Path) -> None:
    assert (folder / "one" / file).read_bytes() == (folder / "several" / file).read_bytes()


def test_what_cannot_be_read_is_left_out_or_named_by_one(folder: Path) -> None:
    one, several = said(folder, "skipped")
    assert several[0] == [0, one[1].replace("one/", "several/"), one[2]] and one[2].count("left out") == 4
    assert len(read_embeddings(folder / "several" / "s.safetensors")) == 7
    _, several = said(folder, "refused")
    assert [status for status, _, _ in several] == [2] * COUNT
    (line,) = "".join(err for _, _, err in several).splitlines()
    assert "damaged/" in line and f"of {COUNT} on " in line


def test_one_process_prints(folder: Path) -> None:
    for name in ("eval", "embed", "again", "index", "info", "export"):
        one, several = said(folder, name)
        assert several[0] == [0, one[1].replace("one/", "several/"), one[2]] and one[1], name
        assert several[1:] == [[0, "", ""]] * (COUNT - 1), name
    assert "rows were there already" not in said(folder, "embed")[1][0][2]
    assert "20 rows were there already" in said(folder, "again")[1][0][2]


def test_nothing_but_the_results_is_left(folder: Path) -> None:
    left = {path.name for path in (folder / "several").iterdir()} - {path.name for path in (folder / "one").iterdir()}
    assert all(name.startswith("d.safetensors.") for name in left), left  # of the call that was refused


def test_an_index_of_images_is_that_of_one_process(folder: Path) -> None:
    assert (folder / "one" / "i.index").read_bytes() == (folder / "several" / "i.index").read_bytes()


def test_other_commands_are_refused(folder: Path) -> None:
    _, several = said(folder, "report")
    assert [status for status, _, _ in several] == [2] * COUNT
    (line,) = "".join(err for _, _, err in several).splitlines()
    assert "gcahng report works in one process, and 3 were started" in line
