"""What happens to a run while it trains: its folder or its data change, a second process comes, clocks turn back."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import platform
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from killed_runs import differences, outcome
from stopped_runs import full_disk_after, interrupted
from tiers import few

from gcahng.cli import main
from gcahng.engine.peers import LostProcess
from gcahng.errors import UserError
from gcahng.files import Held
from gcahng.runs.run_folder import LOCK, RunFolderGone, run_lock
from gcahng.train import TrainConfig, fit, loop, resume
from gcahng.train.session import Session
from gcahng.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("without_pictures")


@contextlib.contextmanager
def happens_in(step: int, action: Callable[[], Any]) -> Iterator[None]:
    """Something is done while a run makes this step."""
    real = Trainer.train_step

    def train_step(self: Trainer) -> Any:
        if self.step + 1 == step:
            action()
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        yield


def record(host: str = platform.node(), pid: int = 1) -> str:
    return json.dumps({"pid": pid, "host": host, "token": "another"}) + "\n"


@pytest.mark.parametrize(
    ("step", "message"),
    few(
        [
            (4, "after step 4; if it was moved, gcahng train --resume with its new place continues from step 3"),
            pytest.param(2, "after step 2; it had no checkpoint yet"),
            pytest.param(8, "after step 8; if it was moved, .* continues from step 6"),
        ]
    ),
)
def test_a_run_folder_that_is_removed(step: int, message: str, config_of_whole: TrainConfig, capsys: Any) -> None:
    """The run ends in one line, and does not make the folder anew."""
    run = Path(str(config_of_whole.out))
    with happens_in(step, lambda: shutil.rmtree(run)), pytest.raises(RunFolderGone, match=message) as error:
        fit(config_of_whole)
    assert str(error.value).startswith(f"{run} was removed, moved or replaced while this process trained it; ")
    assert not run.exists()


def test_a_run_folder_that_is_moved(config_of_whole: TrainConfig, whole: Path, capsys: Any) -> None:
    """Nothing is lost but the steps since the last checkpoint."""
    run = interrupted(config_of_whole, 2)
    moved = run.with_name("moved")
    with happens_in(5, lambda: run.rename(moved)):
        assert main(["train", "--resume", str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"gcahng: error: {run} was removed, moved or replaced") and err.count("\n") == 1
    assert "continues from step 4" in err and not run.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resume(moved)
    assert differences(outcome(whole), outcome(moved)) == []


@pytest.mark.thorough
def test_a_run_folder_that_another_process_has_now(config_of_whole: TrainConfig) -> None:
    run = Path(str(config_of_whole.out))

    def replace() -> None:
        shutil.rmtree(run)
        run.mkdir()
        (run / LOCK).write_text(record())

    with happens_in(4, replace), pytest.raises(RunFolderGone, match="removed, moved or replaced"):
        fit(config_of_whole)
    assert [path.name for path in run.iterdir()] == [LOCK] and (run / LOCK).read_text() == record()


@pytest.mark.thorough
def test_a_file_system_that_numbers_files_anew(config_of_whole: TrainConfig, whole: Path) -> None:
    """The lock file is the same by what it says, and is held again after it was looked at."""
    run = Path(str(config_of_whole.out))

    def renumber() -> None:
        shutil.copy(run / LOCK, run / "copy")
        os.replace(run / "copy", run / LOCK)

    with happens_in(4, renumber):
        fit(config_of_whole)
    assert differences(outcome(whole), outcome(run)) == []


@pytest.mark.thorough
def test_metrics_that_an_editor_replaces(config_of_whole: TrainConfig, whole: Path) -> None:
    run = Path(str(config_of_whole.out))

    def save_again() -> None:
        shutil.copy(run / "metrics.jsonl", run / "copy")
        os.replace(run / "copy", run / "metrics.jsonl")

    with happens_in(4, save_again):
        fit(config_of_whole)
    assert differences(outcome(whole), outcome(run)) == []


@pytest.mark.thorough
def test_metrics_that_are_removed(config_of_whole: TrainConfig, whole: Path) -> None:
    run = Path(str(config_of_whole.out))
    with (
        happens_in(4, lambda: (run / "metrics.jsonl").unlink()),
        pytest.warns(UserWarning, match=r"metrics\.jsonl was removed; the run goes on in a new one"),
    ):
        fit(config_of_whole)
    assert {json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()} == {4, 6, 8}


@pytest.mark.thorough
def test_a_best_checkpoint_that_is_removed(config_of_whole: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run still ends with what its last checkpoint gives."""
    run, real = Path(str(config_of_whole.out)), Session._measure_best
    looked_for: list[Path] = []

    def measure_best(self: Session) -> Any:
        looked_for.append(run)
        (run / "checkpoints" / "best.pt").unlink()
        return real(self)

    monkeypatch.setattr(Session, "_measure_best", measure_best)
    monkeypatch.setattr(Session, "best", property(lambda self: self.__dict__.get("b", {}), early_best), raising=False)
    with pytest.warns(UserWarning, match=r"best\.pt cannot be read: .*; the last checkpoint is the result"):
        summary = fit(config_of_whole)
    assert looked_for and summary["test_best"] is None and summary["best"] == {} and summary["steps"] == 8


def early_best(self: Session, best: dict[str, Any]) -> None:
    """Only the first evaluation chooses a best checkpoint."""
    if not best or best["step"] == 3:
        self.__dict__["b"] = best


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A process that holds a run folder."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException), run_lock(run):
            os.write(writing, b"x")
            signal.alarm(60)
            signal.pause()
        os._exit(1)
    assert os.read(reading, 1) == b"x"
    yield pid, run
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no locks here")
def test_a_second_process_is_told_of_the_first(holder: tuple[int, Path], capsys: Any) -> None:
    """A killed process holds nothing, and leaves nothing to clear away."""
    pid, run = holder
    assert main(["train", "--resume", str(run)]) == 2
    named = f"{run} is being trained by process {pid} on {platform.node()}; wait for its end, or end it"
    assert capsys.readouterr().err == f"gcahng: error: {named}\n"
    os.kill(pid, signal.SIGSTOP)  # it is alive, if it does nothing
    with pytest.raises(Held, match=f"process {pid} on "), run_lock(run):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with run_lock(run):
            assert json.loads((run / LOCK).read_text())["pid"] == os.getpid()
    assert (run / LOCK).read_text() == ""


def test_a_second_thread_is_told_of_the_first(tmp_path: Path) -> None:
    said: list[str] = []

    def second() -> None:
        try:
            with run_lock(tmp_path):
                said.append("both hold it")
        except Held as error:
            said.append(str(error))

    with run_lock(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert said == [f"{tmp_path} is being trained by this process already; wait for its end, or end it"]


def test_a_process_of_another_machine_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(record("elsewhere", 12))
    said = pytest.warns(UserWarning, match=r"process 12 on elsewhere trained .* if it still does, end one of the two")
    with said, run_lock(tmp_path):
        pass
    assert (tmp_path / LOCK).read_text() == ""


@pytest.mark.parametrize("alive", [True, False])
def test_without_locks_the_first_process_is_looked_for(
    alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "lockf", full_disk_after(fcntl.lockf, lambda *_: True, errno.ENOLCK))
    pid = os.getppid()
    if not alive:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    (tmp_path / LOCK).write_text(record(pid=pid))
    refused = pytest.raises(Held, match=rf"trained by process {pid} on .* another one, remove .*/\.lock")
    with (
        pytest.warns(UserWarning, match="cannot be locked"),
        refused if alive else contextlib.nullcontext(),
        run_lock(tmp_path),
    ):
        pass


@pytest.mark.parametrize("content", ["", "x", "[]", "{}", '{"pid": "x", "host": 1, "token": 2}', "\0" * 10, "9" * 5000])
def test_a_damaged_lock_file_is_only_a_lock_file(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with run_lock(tmp_path):
            pass


def test_two_runs_that_begin_at_once(config_of_whole: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has begun, and even ended, after this one saw an empty folder and before it held it."""
    real = loop.make_run_folder

    def make(config: TrainConfig) -> Path:
        run = real(config)
        (run / "summary.json").write_text("{}")
        return run

    monkeypatch.setattr(loop, "make_run_folder", make)
    with pytest.raises(UserError, match="which is not empty; a run is never overwritten"):
        fit(config_of_whole)


@pytest.mark.thorough
def test_a_start_that_was_killed_at_once_can_be_made_again(config_of_whole: TrainConfig) -> None:
    run = Path(str(config_of_whole.out))
    run.mkdir()
    (run / LOCK).write_text(record())
    assert fit(config_of_whole)["steps"] == 8


def test_a_clock_that_runs_backwards(
    config_of_whole: TrainConfig, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are counted by a clock that nobody sets, and steps order everything else."""
    seconds = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(seconds))
    run = interrupted(config_of_whole, 4)
    summary = resume(run)
    assert summary["seconds"] >= summary["step_seconds"] > 0
    assert differences(outcome(whole), outcome(run)) == []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert all(line["images_per_second"] > 0 for line in lines if line["kind"] == "system")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows stops no processes")
def test_a_process_that_is_stopped_and_continued(config_of_whole: TrainConfig, whole: Path) -> None:
    """The wall clock goes on, the CPU's does not, and no bit changes."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            signal.alarm(200)
            with happens_in(4, lambda: os.kill(os.getpid(), signal.SIGSTOP)):
                fit(config_of_whole)
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    start = time.monotonic()
    time.sleep(0.5)
    stopped = time.monotonic() - start
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    run = Path(str(config_of_whole.out))
    assert differences(outcome(whole), outcome(run)) == []
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seconds"] > stopped - 0.01 and summary["step_seconds"] > stopped - 0.01


def test_a_lost_process_is_not_taken_for_a_damaged_checkpoint() -> None:
    said: list[str] = []

    def lose(_: object) -> None:
        raise LostProcess("process 1 of 2 was killed")

    def refuse(_: object) -> None:
        raise UserError("best.pt is damaged")

    of = SimpleNamespace(terminal=SimpleNamespace(warning=said.append), processes=SimpleNamespace(on_first=lose))
    with pytest.raises(LostProcess):
        Session._of_best(of, dict, "another is taken")  # type: ignore[arg-type]
    of.processes.on_first = refuse
    assert Session._of_best(of, dict, "another is taken") == {}  # type: ignore[arg-type]
    assert said == ["best.pt is damaged; another is taken"]
