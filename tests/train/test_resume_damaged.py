"""Runs whose checkpoints are damaged, gone or altered continue from the others, or say why they cannot."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import differences, outcome
from stopped_runs import full_disk_after, interrupted
from tiers import few

import gcahng
from gcahng.cli import main
from gcahng.errors import UserError
from gcahng.files import CannotWrite
from gcahng.runs.checkpoint import find_checkpoint, load_checkpoint
from gcahng.train import TrainConfig, resume

ROOT = Path(gcahng.__file__).parents[1]
MakeConfig = Callable[..., TrainConfig]
pytestmark = pytest.mark.usefixtures("without_pictures")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    # In the middle of a tensor, which is stored as it is.
    tensor = load_checkpoint(path)["model"]["head.1.weight"].numpy().tobytes()
    content[content.index(tensor[:64]) + 10] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", few([flip_a_bit, truncate, empty]))
def test_a_damaged_last_checkpoint(
    damage: Callable[[Path], None], config_of_whole: TrainConfig, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = interrupted(config_of_whole, 5)
    last, previous = run / "checkpoints" / "last.pt", run / "checkpoints" / "previous.pt"
    steps = (load_checkpoint(previous)["step"], load_checkpoint(last)["step"])
    assert steps == (4, 5)
    damage(last)
    good = previous.read_bytes()
    # Even if the next write fails, the good one stays.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full_disk_after(os.replace, lambda *paths: str(paths[1]).endswith("last.pt")))
        with pytest.raises(CannotWrite):
            resume(run, verbose=True)
    warning = capsys.readouterr().err
    assert warning.startswith(f"gcahng: warning: {last} is no checkpoint or is damaged")
    assert f"the run continues from {previous}, step 4" in warning
    assert previous.read_bytes() == good and not last.exists() and last.with_name("last.damaged").exists()
    resume(run)
    last.with_name("last.damaged").unlink()
    assert differences(outcome(whole), outcome(run)) == []


def test_killed_between_two_renames(config_of_whole: TrainConfig, whole: Path) -> None:
    run = interrupted(config_of_whole, 5)
    last, previous = run / "checkpoints" / "last.pt", run / "checkpoints" / "previous.pt"
    last.rename(previous)
    (run / "checkpoints" / ".last.pt.4711.tmp").write_bytes(b"half")
    assert find_checkpoint(run) == previous
    resume(run)
    assert not list(run.rglob("*.tmp"))
    assert differences(outcome(whole), outcome(run)) == []


def test_a_damaged_best_checkpoint_is_said(config_of_whole: TrainConfig) -> None:
    run = interrupted(config_of_whole, 4)
    truncate(run / "checkpoints" / "best.pt")
    with pytest.warns(UserWarning, match=r"best\.pt is no checkpoint or is damaged.*chosen again from step 4 on"):
        summary = resume(run)
    assert summary["best"]["step"] > 4
    assert load_checkpoint(run / "checkpoints" / "best.pt")["step"] == summary["best"]["step"]


def test_a_best_checkpoint_that_is_gone_is_said(config_of_whole: TrainConfig) -> None:
    run = interrupted(config_of_whole, 4)
    (run / "checkpoints" / "best.pt").unlink()
    with pytest.warns(UserWarning, match=r"best\.pt cannot be read: No such file.*chosen again from step 4 on"):
        summary = resume(run)
    assert summary["best"]["step"] > 4
    assert load_checkpoint(run / "checkpoints" / "best.pt")["step"] == summary["best"]["step"]


def test_no_checkpoint_can_be_read(config_of_whole: TrainConfig) -> None:
    run = interrupted(config_of_whole, 4)
    for path in (run / "checkpoints").glob("*.pt"):
        truncate(path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"no checkpoint of .*/run can be read \(.*last\.pt.*step-4\.pt"):
        resume(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def of_another_shape(state: dict[str, Any]) -> None:
    state["loss"]["gca.classifier.bias"] = torch.zeros(2)


def without_a_moment(state: dict[str, Any]) -> None:
    del state["optimizer"]["state"][0]["exp_avg"]


ALTERED = {
    "loss": (of_another_shape, r"the checkpoint does not fit .*classifier\.bias has shape \(2,\)"),
    "optimizer": (without_a_moment, r"the checkpoint does not fit .*KeyError: 'exp_avg'"),
    "no-loss": (lambda state: state.pop("loss"), r"last\.pt has loss of type NoneType; it must be a checkpoint that"),
    "step": (lambda state: state.update(step="5"), r"last\.pt has step of type str; it must be"),
    "seconds": (
        lambda state: state.update(seconds={}),
        r"last\.pt has step, seconds, log, best or left_out that cannot",
    ),
    "left_out": (
        lambda state: state.update(left_out={}),
        r"last\.pt has step, seconds, log, best or left_out that cann",
    ),
}


def test_an_altered_checkpoint_is_one_line_and_nothing_is_written(
    config_of_whole: TrainConfig, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is whole, and what it holds is not what a run continues from."""
    run = interrupted(config_of_whole, 5)
    last = run / "checkpoints" / "last.pt"
    good = last.read_bytes()
    for edit, message in ALTERED.values():
        last.write_bytes(good)
        state = load_checkpoint(last)
        edit(state)
        torch.save(state, last)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert main(["train", "--resume", str(run)]) == 2
        _, err = capsys.readouterr()
        assert re.search(message, err) and err.startswith("gcahng: error: ") and err.count("\n") == 1
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    last.write_bytes(good)
    resume(run)
    assert differences(outcome(whole), outcome(run)) == []


def test_the_newest_of_the_others_is_taken(config_of_whole: TrainConfig, whole: Path) -> None:
    """With last.pt and previous.pt gone, best.pt (step 3 or 6) and step-4.pt are left."""
    run = interrupted(config_of_whole, 5)
    os.utime(run / "checkpoints" / "step-4.pt", (0, 0))  # as if the clock had been put back since
    for which in ("last", "previous"):
        truncate(run / "checkpoints" / f"{which}.pt")
    with pytest.warns(UserWarning, match=r"previous\.pt is no .*; the run continues from .*/step-4\.pt, step 4"):
        resume(run)
    (run / "checkpoints" / "last.damaged").unlink()
    assert differences(outcome(whole), outcome(run)) == []
