"""A run that was stopped continues with the same bits; what prevents that is an error of one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import differences, outcome
from stopped_runs import full_disk_after, interrupted, signal_at
from tiers import few

import gcahng
from gcahng.cli import main
from gcahng.data import DataSplits
from gcahng.errors import UserError
from gcahng.runs import log
from gcahng.runs.checkpoint import find_checkpoint
from gcahng.runs.run_folder import run_lock
from gcahng.streams import Output
from gcahng.train import BackboneConfig, TrainConfig, TrainingInterrupted, fit, resume, session
from gcahng.train import trainer as trainer_module
from gcahng.train.split_metrics import Measured
from gcahng.train.terminal import Lines

ROOT = Path(gcahng.__file__).parents[1]
MakeConfig = Callable[..., TrainConfig]
pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.mark.parametrize("stops", few([(3, 4), (1,), (5, 7), (8,)], 2))
def test_interrupted_and_resumed(stops: tuple[int, ...], config_of_whole: TrainConfig, whole: Path) -> None:
    run = interrupted(config_of_whole, stops[0])
    for stop in stops[1:]:
        with signal_at(stop), pytest.raises(TrainingInterrupted):
            resume(run)
    torch.manual_seed(99)
    generator = torch.get_rng_state()
    summary = resume(str(run))
    assert torch.equal(torch.get_rng_state(), generator)
    assert summary["resumed"] == len(stops) and summary["out"] == str(run)
    assert differences(outcome(whole), outcome(run)) == []
    system = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in system if line["kind"] == "system"] == [2, 3, 4, 6, 8]


@pytest.mark.parametrize(
    "fields",
    [{"loss": "npair"}, {"precision": "bf16"}, {"precision": "fp16"}, {"loss": "arcface", "skip_nonfinite": 1}],
    ids=["npair", "bf16", "fp16", "arcface"],
)
def test_other_runs_resume_too(fields: dict[str, Any], small_config: MakeConfig, tmp_path: Path) -> None:
    fit(small_config(**fields, out=str(tmp_path / "whole")))
    run = interrupted(small_config(**fields, out=str(tmp_path / "run")), 3)
    resume(run)
    assert differences(outcome(tmp_path / "whole"), outcome(run)) == []


def test_tensorboard_holds_every_step_once(whole: Path, config_of_whole: TrainConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = interrupted(config_of_whole, 5)
    # As after a kill: events that no checkpoint knows of.
    shutil.copy(run / "checkpoints" / "previous.pt", run / "checkpoints" / "last.pt")
    resume(run)
    read = []
    for folder in (whole, run):
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        tags = set(events.Tags()["scalars"])
        assert {"system/images_per_second", "system/data_wait", "system/peak_memory_mib"} <= tags
        tags = {tag for tag in tags if not tag.startswith("system/")}
        read.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags})
    assert read[0] == read[1]


def test_before_the_first_checkpoint(config_of_whole: TrainConfig, whole: Path) -> None:
    run = interrupted(config_of_whole, 2)
    shutil.rmtree(run / "checkpoints")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "kind": "tr')
    assert resume(run)["resumed"] == 1
    assert differences(outcome(whole), outcome(run)) == []


def test_a_moved_run(config_of_whole: TrainConfig, whole: Path) -> None:
    run = interrupted(config_of_whole, 4)
    moved = run.with_name("moved")
    run.rename(moved)
    assert resume(moved)["out"] == str(moved)
    assert not run.exists() and differences(outcome(whole), outcome(moved)) == []


def test_pretrained_weights_are_not_needed_again(config_of_whole: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool | None] = []
    real = trainer_module.build_backbone

    def build(config: BackboneConfig, pretrained: bool | None = None) -> torch.nn.Module:
        asked.append(pretrained)
        return real(config, pretrained)

    monkeypatch.setattr(trainer_module, "build_backbone", build)
    run = interrupted(config_of_whole, 7)
    resume(run)
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    with signal_at(1), pytest.raises(TrainingInterrupted):
        resume(run)
    assert asked == [None, False, None]


def test_a_finished_run(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert main(["train", "--resume", str(whole)]) == 0
    out = capsys.readouterr().out
    assert f"{whole} has finished; there is nothing to resume" in out and "Recall@1" in out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert resume(whole)["steps"] == 8


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")  # Windows has none
    monkeypatch.setattr(fcntl, "lockf", full_disk_after(fcntl.lockf, lambda *_: True, errno.ENOLCK))
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"), run_lock(tmp_path):
        pass


@pytest.mark.processes
def test_only_one_process_trains_a_run(config_of_whole: TrainConfig) -> None:
    run = interrupted(config_of_whole, 4)
    code = "import sys, time; from pathlib import Path; from gcahng.runs.run_folder import run_lock\n"
    code += "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"{run} is being trained by process {other.pid} on "):
            resume(run)
    finally:
        other.kill()
        other.wait()
    with run_lock(run):  # a killed process holds nothing
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--resume {tmp}/nothing",
            "resume is {tmp}/nothing, which is no run folder; it must be one that gcahng train wrote",
        ),
        ("--resume {tmp}", "resume is {tmp}, which is no run folder"),
        (
            "--resume {run} --steps 100",
            "--steps cannot be given with --resume: a run continues with its own options",
        ),
        ("--resume={run} --loss=npair", "--loss=npair cannot be given with --resume"),
        ("--resume", "argument --resume: expected one argument"),
        ("--resume {run} --threads x", "argument --threads: invalid int value: 'x'"),
        ("--resume {run} --data.skip_unreadable x", "argument --data.skip_unreadable: 'x' is neither true nor false"),
        ("--resume {run} --threads 0", "threads is 0; it must be a whole number of at least 1 and at most 1,024"),
        ("--resume {run} --device tpu", "device is 'tpu'; it must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_mistakes(arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("steps: 5\ndevice: cpu\n")
    places = {"tmp": tmp_path, "run": run}
    assert main(["train", *arguments.format(**places).split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"gcahng: error: {message.format(**places)}") and err.count("\n") == 1


def test_other_data(config_of_whole: TrainConfig, small_data: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(config_of_whole, 4)
    monkeypatch.setattr("gcahng.train.loop.load_data", lambda _: replace(small_data, digest="0" * 16))
    with pytest.raises(UserError, match="the checkpoint was trained on data .* and these are 0000"):
        resume(run)


def test_what_may_change_the_bits_is_said(config_of_whole: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(config_of_whole, 4)
    monkeypatch.setattr("gcahng.train.loop.versions", lambda: {"torch": "0.1"})
    monkeypatch.setattr("gcahng.train.session.Session.finish", lambda self: {})
    with pytest.warns(UserWarning) as warned:
        resume(run, threads=2, workers=3)
    messages = [str(warning.message) for warning in warned if "last bits" in str(warning.message)]
    assert [message.split(";")[0] for message in messages] == [
        "threads was 1 and is 2",
        f"torch was {torch.__version__} and is 0.1",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_message_names_the_command(
    number: int, config_of_whole: TrainConfig, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("gcahng.commands.train.parse", lambda _: replace(config_of_whole, out=str(tmp_path / "a run")))
    with signal_at(4, number):
        assert main(["train"]) == 128 + number
    out, err = capsys.readouterr()
    run = tmp_path / "a run"
    assert err == (
        f"gcahng: interrupted after step 4 of 8; {run}/checkpoints/last.pt holds everything; to continue: gcahng train "
        f"--resume '{run}' (in Python: gcahng.train.resume('{run}'))\n"
    )
    assert main(["train", "--resume", str(run)]) == 0
    out, err = capsys.readouterr()
    assert f"continues in {run} after step 4" in out and err == ""


def test_nobody_reads_what_training_prints(
    config_of_whole: TrainConfig, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gcahng train … | head ends as by a signal. After the last step it makes no difference who reads."""
    read, write = os.pipe()
    out = Output(os.fdopen(write, "w", encoding="utf-8"), 1)
    monkeypatch.setattr(sys, "stdout", out)
    real = Lines.evaluation

    def then_the_reader_goes(self: Lines, step: int, *rest: Any) -> None:
        if step == 3:
            os.close(read)
        real(self, step, *rest)

    monkeypatch.setattr(Lines, "evaluation", then_the_reader_goes)
    run = Path(str(config_of_whole.out))
    with pytest.raises(TrainingInterrupted, match="what reads the output has gone; interrupted after step 3 of 8") as e:
        fit(config_of_whole, verbose=True)
    assert e.value.exit_code == 141 and find_checkpoint(run).name == "last.pt"
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    resume(run)
    assert differences(outcome(whole), outcome(run)) == []


def test_a_signal_while_the_test_classes_are_measured(
    config_of_whole: TrainConfig, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps are made, and the next session does the rest."""
    real, sent = session.measure, []

    def measure_and_signal(model: Any, data: Any, split: Any, *rest: Any) -> Measured:
        if split == "test" and not sent:  # a second one would end the process
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, data, split, *rest)

    run = Path(str(config_of_whole.out))
    with monkeypatch.context() as patch:
        patch.setattr(session, "measure", measure_and_signal)
        with pytest.raises(TrainingInterrupted, match="interrupted after step 8 of 8") as caught:
            fit(config_of_whole)
    assert caught.value.exit_code == 143 and not (run / "summary.json").exists()
    resume(run)
    assert differences(outcome(whole), outcome(run)) == []


@pytest.mark.parametrize("torn", [b"", b'{"step": 3, "ki', b'{"step": 2, "kind": "val"}', b"\xff\n"])
def test_lines_of_later_steps_are_cut(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "kind": "train"}).encode() + b"\n" for step in (1, 2, 2, 3, 4)]
    for count in (2, 3, 5):
        path.write_bytes(b"".join(lines[:count]) + torn)
        log._cut(path, 2)
        assert path.read_bytes() == b"".join(lines[: min(count, 3)])
    log._cut(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_damaged_line_among_good_ones_is_not_cut(tmp_path: Path) -> None:
    """What follows it is the user's too."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "kind": "train"}).encode() + b"\n" for step in (1, 2, 2, 3, 4)]
    for broken in (
        b"\xff\n",
        b"\n",
        b"[]\n",
        b'{"step": "1", "kind": "train"}\n',
        b'{"step": 9, "kind": "train"}\n',
        b"7\n",
    ):
        content = b"".join([lines[0], broken, *lines[1:]])
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged; restore the file or remove that line"):
            log._cut(path, 2)
        assert path.read_bytes() == content
