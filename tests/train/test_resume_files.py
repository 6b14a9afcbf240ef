"""Runs on image files: resumed with any number of workers, stopped with the whole process group."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from killed_runs import differences, outcome
from PIL import Image
from tiers import few

import gcahng
from gcahng.cli import main
from gcahng.config import config_to_dict
from gcahng.data import load_data
from gcahng.errors import UserError
from gcahng.runs.checkpoint import load_checkpoint, save_checkpoint
from gcahng.train import (
    BackboneConfig,
    DataConfig,
    GcaConfig,
    NonFinite,
    OptimizerConfig,
    TrainConfig,
    TrainingInterrupted,
    fit,
    resume,
)
from gcahng.train.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from trees import make_csv, make_cub200, make_inshop

ROOT = Path(gcahng.__file__).parents[1]


@pytest.fixture(autouse=True)
def the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs read the files, not the glyphs that every other run of these tests sees."""
    monkeypatch.setattr("gcahng.train.loop.load_data", load_data)


@pytest.fixture(scope="module")
def cub200(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cub200(tmp_path_factory.mktemp("data") / "cub200", classes=12, images=6)


@pytest.fixture
def config(cub200: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        epochs=2,
        keep_every=4,
        log_every=2,
        device="cpu",
        threads=1,
        out=str(tmp_path / "run"),
        data=DataConfig(
            name="cub200",
            root=str(cub200),
            classes_per_batch=3,
            samples_per_class=2,
            val_classes=2,
            image_size=16,
            resize=20,
            workers=0,
        ),
        backbone=BackboneConfig(embedding_dim=8, width=4, freeze_bn=True),
        optimizer=OptimizerConfig(schedule="step", step_epochs=1, warmup_epochs=1),
        gca=GcaConfig(heads=2),
    )


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = Trainer.train_step

    def step_then_signal(self: Trainer) -> Any:
        logs = real(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return logs

    monkeypatch.setattr(Trainer, "train_step", step_then_signal)


@pytest.mark.processes
def test_any_number_of_workers(config: TrainConfig, tmp_path: Path) -> None:
    fit(replace(config, out=str(tmp_path / "whole")))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted):
        stop_at(patch, 3)
        fit(replace(config, data=replace(config.data, workers=2)))
    run = Path(str(config.out))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted):
        stop_at(patch, 5)
        resume(run, workers=1)
    summary = resume(run, workers=0)
    assert summary["steps"] == 8 and summary["resumed"] == 2
    found = [outcome(folder) for folder in (tmp_path / "whole", run)]
    assert all(name.endswith("/config/data/workers") for name in differences(*found))
    assert found[0]["summary"]["best"] and (run / "retrieval.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def stopped(config: TrainConfig, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A run that a signal stopped, and the images of one of its training classes, in a data set of its own."""
    root = make_cub200(tmp_path / "cub200", classes=12, images=6)
    config = replace(config, data=replace(config.data, root=str(root)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted):
        stop_at(patch, 3)
        fit(config)
    train = load_data(config.data).train
    (root / ".gcahng-cub200.json").unlink()  # as after `gcahng data verify`, which looks at every file
    return Path(str(config.out)), [train.file(i) for i in range(len(train)) if train.labels[i] == 0]


def test_a_restored_file_does_not_end_a_run(stopped: tuple[Path, list[Path]]) -> None:
    run, images = stopped
    Image.new("RGB", (50, 50)).save(images[0])
    with pytest.warns(UserWarning, match="files of the data set have other sizes than when the checkpoint was written"):
        assert resume(run)["steps"] == 8


def test_a_file_that_is_gone_does(stopped: tuple[Path, list[Path]]) -> None:
    run, images = stopped
    listing = images[0].parents[2] / "images.txt"
    lines = listing.read_text().splitlines(keepends=True)
    listing.write_text("".join(line for line in lines if images[0].name not in line))
    with pytest.raises(UserError, match="image 1 is not in images.txt; restore the original"):
        resume(run)


@pytest.mark.parametrize("change", few(["removed", "replaced", "added"]))
def test_data_that_changes_in_mid_run(change: str, stopped: tuple[Path, list[Path]], capsys: Any) -> None:
    """The run has listed its files at its start, and reads each when it needs it."""
    run, images = stopped
    before = images[0].read_bytes()

    def change_data(step: int) -> None:
        if step != 4:
            return
        for image in images:
            if change == "removed":
                image.unlink()
            elif change == "replaced":
                Image.new("RGB", (50, 50)).save(image)
            else:
                image.with_name(f"new {image.name}").write_bytes(before)

    real = Trainer.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda self: (change_data(self.step), real(self))[1])
        status = main(["train", "--resume", str(run)])
    err = capsys.readouterr().err
    if change != "removed":
        assert status == 0 and err == ""
        return
    assert status == 2 and err.count("\n") == 1
    assert re.match(rf"gcahng: error: {images[0].parent}/.* cannot be read as an image: No such file", err)
    assert f"the last good checkpoint is of step 4; gcahng train --resume {run} continues from it" in err
    for image in images:
        image.write_bytes(before)
    assert main(["train", "--resume", str(run)]) == 0


def test_a_run_that_continues_elsewhere(
    stopped: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As on another machine: the run and the data have other places, which were relative to the old folder."""
    run, images = stopped
    root = images[0].parents[2]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run.rename(elsewhere / "run")
    monkeypatch.chdir(elsewhere)
    for path in (elsewhere / "run" / "checkpoints").glob("*.pt"):
        state = load_checkpoint(path)
        state["config"]["data"]["root"] = "data/cub200"
        save_checkpoint(path, state)
    assert main(["train", "--resume", "run"]) == 2
    said = f"data.root of the run is data/cub200, which does not exist in {elsewhere}; give --data.root with its place"
    assert capsys.readouterr().err == f"gcahng: error: {said}\n"
    assert main(["train", "--resume", "run", "--data.root", str(root)]) == 0
    assert json.loads((elsewhere / "run" / "summary.json").read_text())["steps"] == 8


def test_a_moved_csv(config: TrainConfig, tmp_path: Path) -> None:
    lists = make_csv(tmp_path / "csv")
    data = replace(config.data, name="csv", root=str(lists.parent), csv=str(lists), val_classes=0, classes_per_batch=2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted):
        stop_at(patch, 1)
        fit(replace(config, data=data))
    moved = lists.rename(tmp_path / "moved.csv")
    run = Path(str(config.out))
    with pytest.raises(UserError, match=r"data\.csv of the run is .*list\.csv, which does not exist; give --data\.csv"):
        resume(run)
    content = moved.read_text()
    moved.write_text(content.rsplit("\n", 2)[0] + "\n")
    with pytest.raises(UserError, match="files were added, removed or renamed, or labels changed; restore the data"):
        resume(run, csv=str(moved))
    moved.write_text(content)
    assert resume(run, csv=str(moved))["out"] == str(run)


@pytest.mark.thorough
def test_a_damaged_file_can_be_left_out_from_now_on(stopped: tuple[Path, list[Path]], capsys: Any) -> None:
    run, images = stopped
    for image in images[1:]:
        image.write_bytes(b"no image")
    assert main(["train", "--resume", str(run)]) == 2
    assert "data.skip_unreadable" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--data.skip_unreadable", "true"]) == 0
    assert "times another image replaced one that cannot be read" in capsys.readouterr().out


def test_images_that_are_not_finite_are_named(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer.__init__

    def init(self: Trainer, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        self.model.head[1].weight.register_hook(lambda gradient: gradient * float("nan"))

    monkeypatch.setattr(Trainer, "__init__", init)
    with pytest.raises(NonFinite, match=r"the network's gradient is nan at step 1; the batch's images are .*\.jpg, "):
        fit(config)
    noted = json.loads((Path(str(config.out)) / "nonfinite.jsonl").read_text())
    assert len(noted["images"]) == 6
    assert all((Path(str(config.data.root)) / name).is_file() for name in noted["images"])


@pytest.mark.thorough
def test_a_gallery_of_files(config: TrainConfig, tmp_path: Path) -> None:
    root = make_inshop(tmp_path / "inshop")
    summary = fit(replace(config, epochs=1, data=replace(config.data, name="inshop", root=str(root), val_classes=0)))
    assert summary["selected_on"] is None and {"recall@1", "recall@50"} <= set(summary["test"])


@pytest.mark.processes
def test_ctrl_c_reaches_the_workers_too(config: TrainConfig, tmp_path: Path) -> None:
    """As in a terminal: the signal goes to every process of the group."""
    options = f"--config {tmp_path}/options.yaml --steps 100000 --eval_every 5 --log_every 5 --data.workers 2"
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(config_to_dict(replace(config, epochs=None))))
    process = subprocess.Popen(
        [sys.executable, "-m", "gcahng", "train", *options.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.startswith("gcahng: interrupted after step ") and err.count("\n") == 1
