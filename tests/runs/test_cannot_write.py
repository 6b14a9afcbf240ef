"""Runs whose files cannot be written: a full disk, a read-only folder, a limit on sizes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
from killed_runs import FileStandIn, differences, outcome
from stopped_runs import full_disk_after, interrupted
from tiers import few

from gcahng import files
from gcahng.cli import main
from gcahng.data import DataSplits
from gcahng.files import CannotWrite
from gcahng.train import TrainConfig, fit, resume

pytestmark = pytest.mark.usefixtures("without_pictures")


class FullDisk(FileStandIn):
    """A file to which only so many bytes can be written."""

    def __init__(self, file: Any, room: int) -> None:
        super().__init__(file)
        self._room = room

    def write(self, data: bytes) -> int:
        if len(data) > self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._room -= len(data)
        return self._file.write(data)


@pytest.mark.parametrize("where", few(["write", "open", "fsync", "metrics", "tensorboard", "summary"], 2))
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
            from gcahng.runs.log import json as log_json

            fails = full_disk_after(log_json.dumps, lambda line: line["step"] == 6)
            patch.setattr("gcahng.runs.log.json", types.SimpleNamespace(dumps=fails, loads=json.loads))
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
    assert f"gcahng train --resume {run} continues from it once that is repaired" in err
    if where != "summary":
        assert last.read_bytes() == before
    assert not list(run.rglob("*.tmp"))
    assert main(["train", "--resume", str(run)]) == 0
    assert differences(outcome(whole), outcome(run)) == []


def test_no_room_for_the_first_checkpoint(config_of_whole: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", full_disk_after(os.replace, lambda *paths: str(paths[1]).endswith("last.pt")))
    with pytest.raises(CannotWrite, match="there is no checkpoint yet; gcahng train --resume .* starts again once"):
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
