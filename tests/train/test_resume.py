"""A run that was ended goes on with the same bits; what stands in its way is one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import differences, no_pictures, outcome

import gcahng
from gcahng.cli import main
from gcahng.data import DataSplits
from gcahng.errors import UserError
from gcahng.train import (
    BackboneConfig,
    DataConfig,
    TrainConfig,
    TrainingInterrupted,
    files,
    fit,
    log,
    resume,
    session,
)
from gcahng.train import trainer as trainer_module
from gcahng.train.checkpoint import find_checkpoint, load_checkpoint
from gcahng.train.devices import deterministic
from gcahng.train.files import CannotWrite, run_lock
from gcahng.train.measure import Measured
from gcahng.train.trainer import Trainer

ROOT = Path(gcahng.__file__).parents[1]
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcahng.train.session._draw", no_pictures)


@contextlib.contextmanager
def signal_at(step: int, number: int = signal.SIGINT) -> Iterator[None]:
    """A signal comes during this step."""
    real = Trainer.train_step

    def step_then_signal(self: Trainer) -> Any:
        logs = real(self)
        if self.step == step:
            os.kill(os.getpid(), number)
        return logs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_then_signal)
        yield


def interrupted(config: TrainConfig, step: int) -> Path:
    """A run that was stopped after a step."""
    with signal_at(step), pytest.raises(TrainingInterrupted):
        fit(config)
    return Path(str(config.out))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_config: MakeConfig, small_data: DataSplits) -> Path:
    """A run that was never interrupted: 8 steps, epochs of 3, evaluations after 3, 6 and 8."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gcahng.train.loop.load_data", lambda _: small_data)
        patch.setattr("gcahng.train.session._draw", no_pictures)
        fit(small_config(steps=8, eval_every=3, keep_every=4, out=str(out)))
    return out


@pytest.fixture
def config_of_whole(small_config: MakeConfig, tmp_path: Path) -> TrainConfig:
    return small_config(steps=8, eval_every=3, keep_every=4, out=str(tmp_path / "run"))


@pytest.mark.parametrize("stops", [(1,), (3, 4), (5, 7), (8,)])
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


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
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
    assert f"going on from {previous}, step 4" in warning
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
    with pytest.warns(UserWarning, match=r"best\.pt is no checkpoint or is damaged.*chosen anew from step 4 on"):
        summary = resume(run)
    assert summary["best"]["step"] > 4
    assert load_checkpoint(run / "checkpoints" / "best.pt")["step"] == summary["best"]["step"]


def test_a_best_checkpoint_that_is_gone_is_said(config_of_whole: TrainConfig) -> None:
    run = interrupted(config_of_whole, 4)
    (run / "checkpoints" / "best.pt").unlink()
    with pytest.warns(UserWarning, match=r"best\.pt cannot be read: No such file.*chosen anew from step 4 on"):
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


def test_a_finished_run(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert main(["train", "--resume", str(whole)]) == 0
    out = capsys.readouterr().out
    assert f"{whole} has finished; there is nothing to go on with" in out and "Recall@1" in out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert resume(whole)["steps"] == 8


def test_the_newest_of_the_others_is_taken(config_of_whole: TrainConfig, whole: Path) -> None:
    """With last.pt and previous.pt gone, best.pt (step 3 or 6) and step-4.pt are left."""
    run = interrupted(config_of_whole, 5)
    for which in ("last", "previous"):
        truncate(run / "checkpoints" / f"{which}.pt")
    with pytest.warns(UserWarning, match=r"previous\.pt is no .*; going on from .*/step-4\.pt, step 4"):
        resume(run)
    (run / "checkpoints" / "last.damaged").unlink()
    assert differences(outcome(whole), outcome(run)) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")  # Windows has none
    monkeypatch.setattr(fcntl, "lockf", full_disk_after(fcntl.lockf, lambda *_: True, errno.ENOLCK))
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"), run_lock(tmp_path):
        pass


def test_only_one_process_trains_a_run(config_of_whole: TrainConfig) -> None:
    run = interrupted(config_of_whole, 4)
    code = "import sys, time; from pathlib import Path; from gcahng.train.files import run_lock\n"
    code += "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"{run} is being trained by another process"):
            resume(run)
    finally:
        other.kill()
        other.wait()
    with run_lock(run):  # a killed process holds nothing
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--resume {tmp}/nothing", "resume is {tmp}/nothing, which is no run folder; name one that gcahng train wrote"),
        ("--resume {tmp}", "resume is {tmp}, which is no run folder"),
        (
            "--resume {run} --steps 100",
            "--steps cannot be given with --resume: a run goes on with its own options",
        ),
        ("--resume={run} --loss=npair", "--loss=npair cannot be given with --resume"),
        ("--resume", "argument --resume: expected one argument"),
        ("--resume {run} --threads x", "argument --threads: invalid int value: 'x'"),
        ("--resume {run} --threads 0", "threads is 0; it must be at least 1"),
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
        f"gcahng: interrupted after step 4 of 8; {run}/checkpoints/last.pt holds everything, to go on: gcahng train "
        f"--resume '{run}'\n"
    )
    assert main(["train", "--resume", str(run)]) == 0
    out, err = capsys.readouterr()
    assert f"goes on in {run} after step 4" in out and err == ""


def test_a_signal_while_the_test_classes_are_measured(
    config_of_whole: TrainConfig, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps are made; the rest is for the next session."""
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


# -- what cannot be written


def full_disk_after(real: Callable[..., Any], when: Callable[..., bool], number: int = errno.ENOSPC) -> Any:
    """`real`, but for calls that fail as on a full disk."""

    def failing(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    return failing


class FullDisk:
    """A file to which only so many bytes can be written."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: bytes) -> int:
        if len(data) > self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._room -= len(data)
        return self._file.write(data)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("where", ["write", "fsync", "open", "metrics", "tensorboard", "summary"])
def test_a_full_disk_or_a_read_only_folder(
    where: str, config_of_whole: TrainConfig, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = interrupted(config_of_whole, 4)
    last = run / "checkpoints" / "last.pt"
    before = last.read_bytes()
    reason = "Read-only file system" if where == "open" else "No space left on device"
    with pytest.MonkeyPatch.context() as patch:
        if where == "write":

            def opened(path: Any, *mode: str) -> Any:
                file = open(path, *mode)  # noqa: SIM115  # its user closes it
                return FullDisk(file, 30_000) if ".last.pt." in str(path) else file

            patch.setattr(files, "open", opened, raising=False)
        elif where == "fsync":
            patch.setattr(os, "fsync", full_disk_after(os.fsync, lambda _: True))
        elif where == "open":
            fails = full_disk_after(open, lambda path, *_: "checkpoints" in str(path), errno.EROFS)
            patch.setattr(files, "open", fails, raising=False)
        elif where == "metrics":
            from gcahng.train.log import json as log_json

            fails = full_disk_after(log_json.dumps, lambda line: line["step"] == 6)
            patch.setattr("gcahng.train.log.json", types.SimpleNamespace(dumps=fails, loads=json.loads))
        elif where == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            fails = full_disk_after(SummaryWriter.add_scalar, lambda _, name, value, step: step == 6)
            patch.setattr(SummaryWriter, "add_scalar", fails)
        else:
            patch.setattr("gcahng.train.session.write_json", full_disk_after(files.write_json, lambda *_: True))
        assert main(["train", "--resume", str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"gcahng: error: {run}/") and f"cannot be written: {reason}" in err and err.count("\n") == 1
    assert f"; the last good checkpoint is of step {8 if where == 'summary' else 4}" in err
    assert f"gcahng train --resume {run} goes on from it when that is mended" in err
    if where != "summary":
        assert last.read_bytes() == before
    assert not list(run.rglob("*.tmp"))
    assert main(["train", "--resume", str(run)]) == 0
    assert differences(outcome(whole), outcome(run)) == []


def test_no_room_for_the_first_checkpoint(config_of_whole: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", full_disk_after(os.replace, lambda *paths: str(paths[1]).endswith("last.pt")))
    with pytest.raises(CannotWrite, match="there is no checkpoint yet; gcahng train --resume .* starts again when"):
        fit(config_of_whole)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file sizes")
def test_a_file_size_limit(config_of_whole: TrainConfig, whole: Path, small_data: DataSplits) -> None:
    """The kernel itself refuses: nothing of Python is replaced."""
    run = interrupted(config_of_whole, 5)
    last = run / "checkpoints" / "last.pt"
    size, before = last.stat().st_size, last.read_bytes()
    pid = os.fork()
    if pid == 0:
        import resource

        signal.alarm(300)
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 4096, size - 4096))
            try:
                resume(run)
            except CannotWrite as error:
                os._exit(0 if ".pt cannot be written: File too large" in str(error) else 3)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert last.read_bytes() == before and not list(run.rglob("*.tmp"))
    resume(run)
    assert differences(outcome(whole), outcome(run)) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other rights")
def test_a_folder_without_the_right_to_write(config_of_whole: TrainConfig) -> None:
    run = interrupted(config_of_whole, 4)
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are for this user alone
        folder = Path(place) / "run"
        shutil.copytree(run, folder)
        Path(place).chmod(0o755)
        folder.chmod(0o555)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        pid = os.fork()
        if pid == 0:
            signal.alarm(300)
            with contextlib.suppress(BaseException):
                if os.getuid() == 0:  # whom no mode stops
                    os.setuid(65534)
                try:
                    resume(folder)
                except CannotWrite as error:
                    os._exit(0 if str(error) == f"{folder}/.lock cannot be written: Permission denied" else 3)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        folder.chmod(0o755)


# -- which checkpoint is the best


def lines_of(run: Path, kind: str) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == kind]


def fitted(config: TrainConfig, data: DataSplits, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Path]:
    monkeypatch.setattr("gcahng.train.loop.load_data", lambda _: data)
    return fit(config), Path(str(config.out))


def test_validation_classes_choose(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["selected_on"] == "val" and lines_of(whole, "val") == [3, 6, 8] and lines_of(whole, "test") == []
    values = [
        json.loads(line)["map@r"] for line in (whole / "metrics.jsonl").read_text().splitlines() if '"val"' in line
    ]
    assert summary["best"]["val"]["map@r"] == max(values)
    assert summary["best"]["step"] == [3, 6, 8][values.index(max(values))]
    assert (summary["test_best"] == summary["test"]) == (summary["best"]["step"] == 8)


def test_of_equal_checkpoints_the_first_is_the_best(
    config_of_whole: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter((0.5, 0.75, 0.75))

    def measured(model: Any, data: Any, split: str, *_: Any) -> Measured:
        return Measured({"map@r": next(found) if split == "val" else 0.0, "recall@1": 0.0}, torch.zeros(1))

    monkeypatch.setattr("gcahng.train.session.measure", measured)
    summary = fit(config_of_whole)
    assert summary["best"]["step"] == 6 and summary["val"]["map@r"] == 0.75
    assert load_checkpoint(Path(str(config_of_whole.out)) / "checkpoints" / "best.pt")["step"] == 6


@pytest.mark.parametrize("select", ["auto", "last"])
def test_without_validation_classes_nothing_is_chosen(
    select: Any, config_of_whole: TrainConfig, small_data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary, run = fitted(replace(config_of_whole, select=select), replace(small_data, val=None), monkeypatch)
    assert summary["selected_on"] is None and summary["best"] == {} and summary["val"] == {}
    assert summary["test_best"] is None
    assert lines_of(run, "test") == [3, 6, 8] and lines_of(run, "val") == []
    assert not (run / "checkpoints" / "best.pt").exists()
    with pytest.raises(UserError, match="holds no checkpoints/best.pt"):
        find_checkpoint(run, "best")


def test_the_last_may_be_wanted_beside_validation(config_of_whole: TrainConfig, tmp_path: Path) -> None:
    summary = fit(replace(config_of_whole, select="last"))
    assert summary["best"] == {} and summary["val"]["map@r"] > 0


def test_test_classes_choose_with_a_warning(
    config_of_whole: TrainConfig, small_data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match="select is 'test': .* its numbers are too good") as warned:
        summary, run = fitted(replace(config_of_whole, select="test"), replace(small_data, val=None), monkeypatch)
    assert len([w for w in warned if "select is" in str(w.message)]) == 1
    assert summary["selected_on"] == "test" and summary["best"]["test"] == summary["test_best"]
    measured = [
        json.loads(line)["recall@1"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"test"' in line
    ]
    assert summary["best"]["test"]["recall@1"] == max(measured)
    assert load_checkpoint(run / "checkpoints" / "best.pt")["step"] == summary["best"]["step"]


def test_validation_is_wanted_and_there_is_none(
    config_of_whole: TrainConfig, small_data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config_of_whole, select="val", data=DataConfig(val_classes=0))
    with pytest.raises(UserError, match="select is 'val' and data.val_classes is 0"):
        fitted(config, replace(small_data, val=None), monkeypatch)
    assert not Path(str(config.out)).exists()


def test_a_gallery(config_of_whole: TrainConfig, small_data: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    """In-Shop's way: test queries look in a gallery, and not among themselves."""
    test = small_data.test
    faces = torch.arange(len(test)) % 12
    queries, gallery = test.subset((faces < 2).nonzero().flatten()), test.subset((faces >= 2).nonzero().flatten())
    data = replace(small_data, test=queries, gallery=gallery, recall_at=(1, 10))
    config = replace(config_of_whole, steps=2, loss="npair")
    summary, run = fitted(config, data, monkeypatch)
    assert summary["test"]["queries"] == 2 * 40 and {"recall@1", "recall@10"} <= set(summary["test"])
    from gcahng.retrieval import retrieval_metrics
    from gcahng.train.evaluate import embed
    from gcahng.train.models import load_model

    network = load_model(run).network
    z = [embed(network, images, torch.device("cpu")) for images in (queries, gallery)]
    expected = retrieval_metrics(
        z[0], queries.labels, gallery_embeddings=z[1], gallery_labels=gallery.labels, recall_at=(1, 10)
    )
    assert summary["test"] == pytest.approx(expected, rel=1e-12)


# -- what else a run folder holds


def test_last_is_written_last(config_of_whole: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on from last.pt: by then the lines of its losses, the best and the kept ones are there."""
    written = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            written.append(name or path.name)
            return real(path, *arguments, **options)

        return call

    monkeypatch.setattr(session, "save_checkpoint", noted("", session.save_checkpoint))
    monkeypatch.setattr(session, "save_model", noted("", session.save_model))
    monkeypatch.setattr(session.RunLog, "flush", noted("lines", session.RunLog.flush))
    fit(replace(config_of_whole, loss="npair", steps=4, eval_every=4))
    files_of = [[f"{which}.safetensors", f"{which}.pt"] for which in ("best", "step-4", "last")]
    assert written == ["lines", *sum(files_of, [])]


def test_weights_as_safetensors(whole: Path) -> None:
    from gcahng.train.models import load_model

    for which in ("last", "best", "step-4", "step-8"):
        state = load_checkpoint(whole / "checkpoints" / f"{which}.pt")
        model = load_model(whole / "checkpoints" / f"{which}.safetensors")
        assert model.step == state["step"] and model.data_digest == state["data_digest"]
        assert differences(state["model"], dict(model.network.state_dict())) == []
    assert not (whole / "checkpoints" / "step-6.pt").exists()


def test_epochs(small_config: MakeConfig, tmp_path: Path) -> None:
    """12 training classes of 12 images in batches of 12: an epoch has 12 steps."""
    config = small_config(epochs=2, eval_every_epochs=2, loss="npair", log_every=100, out=str(tmp_path / "run"))
    summary = fit(config)
    assert summary["steps"] == 24 and lines_of(tmp_path / "run", "val") == [24]
    kept = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["config"]
    assert (kept["steps"], kept["steps_per_epoch"], kept["eval_every"], kept["epochs"]) == (24, 12, 24, 2)


def test_system_lines(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    system = [line for line in lines if line["kind"] == "system"]
    assert [line["step"] for line in system] == [2, 3, 4, 6, 8]
    for line in system:
        assert line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1 and line["lr"] == 1e-3
        assert 50 < line["peak_memory_mib"] < 100_000


def test_deterministic_algorithms_for_a_while() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        with deterministic(False):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(False):
            pass
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"precision": "bf16"}, {"precision": "fp16"}, {"skip_nonfinite": 1}])
def test_on_cuda_with_deterministic(fields: dict[str, Any], small_config: MakeConfig, tmp_path: Path) -> None:
    fields = {**fields, "device": "cuda", "deterministic": True}
    fit(small_config(**fields, out=str(tmp_path / "whole")))
    run = interrupted(small_config(**fields, out=str(tmp_path / "run")), 3)
    resume(run)
    assert differences(outcome(tmp_path / "whole"), outcome(run)) == []


def test_seconds_add_up(config_of_whole: TrainConfig) -> None:
    run = interrupted(config_of_whole, 4)
    before = load_checkpoint(run / "checkpoints" / "last.pt")["seconds"]
    summary = resume(run)
    assert before["all"] > before["step"] > 0
    assert summary["seconds"] > before["all"] and summary["step_seconds"] > before["step"]
    assert summary["step_cpu_seconds"] > before["step_cpu"]


def test_weights_and_biases(config_of_whole: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gcahng._extras.find_spec", lambda name: None if name == "wandb" else True)
        with pytest.raises(UserError, match=r'wandb is not installed; pip install "gcahng\[wandb\]"'):
            fit(replace(config_of_whole, wandb="glyphs"))
    started: list[dict[str, Any]] = []
    sent: list[tuple[int, dict[str, float]]] = []
    ended: list[int] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            sent.append((step, values))

        def finish(self, exit_code: int) -> None:
            ended.append(exit_code)

    stub = types.ModuleType("wandb")
    stub.__spec__ = ModuleSpec("wandb", None)
    stub.init = lambda **options: (started.append(options), Run())[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    run = interrupted(replace(config_of_whole, wandb="glyphs"), 4)
    resume(run)
    assert [options["project"] for options in started] == ["glyphs"] * 2 and ended == [1, 0]
    assert started[0]["id"] == started[1]["id"] and all(options["resume"] == "allow" for options in started)
    assert started[0]["config"]["steps"] == 8
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for (step, values), line in zip(sent, lines, strict=True):
        assert step == line.pop("step")
        kind = line.pop("kind")
        assert values == {f"{kind}/{name}": value for name, value in line.items() if not isinstance(value, list)}
