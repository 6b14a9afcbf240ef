"""The folder of a run: made new, never over another run, and held by one process."""

from __future__ import annotations

import json
import os
import platform
import secrets
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from gcahng.config import TrainConfig
from gcahng.errors import UserError, UserNote
from gcahng.files import Held, lock, writing
from gcahng.paths import check_parent, check_source, check_utf8

LOCK = ".lock"


class RunFolderGone(UserError):
    """The folder of a run that this process trains was removed, moved or replaced."""


class _Holding:
    """A run folder that this process holds: the open lock file, and what it says."""

    def __init__(self, file: IO[str], record: dict[str, Any]) -> None:
        self.file, self.record = file, record


# By absolute path. Locks of the system are between processes, so threads of one look here.
_holdings: dict[str, _Holding] = {}
_one_at_a_time = threading.Lock()


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold a run folder for this process; the system releases it when the process ends, however it ends.

    The lock file says which process on which machine holds the folder. It is emptied at the end, so what it says
    otherwise is of a process that was killed, or of one on another machine whose locks do not reach this one.

    Raises:
        Held: another process, or another thread of this one, holds it.
        CannotWrite: the folder is read-only.
    """
    path, name = run / LOCK, os.path.abspath(run)
    with _one_at_a_time:
        # Before the file is opened: closing it would release the lock that another thread has on it.
        if name in _holdings:
            raise Held(f"{run} is being trained by this process already; wait for its end, or end it")
        with writing(path):
            file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115  # closed below
        try:
            holding = _holdings[name] = _Holding(file, _take(file, run))
        except BaseException:
            file.close()
            raise
    try:
        yield
    finally:
        with _one_at_a_time:
            del _holdings[name]
            if _is_ours(path, holding):
                with suppress(OSError):
                    file.truncate(0)
            file.close()


def check_run_lock(run: Path) -> None:
    """See that a run folder which this process holds is still there and still its own.

    Raises:
        RunFolderGone: it is not.
    """
    holding = _holdings.get(os.path.abspath(run))
    if holding is not None and not _is_ours(run / LOCK, holding):
        raise RunFolderGone(f"{run} was removed, moved or replaced while this process trained it")


def _take(file: IO[str], run: Path) -> dict[str, Any]:
    """Lock the open lock file and write into it who has it; returns that."""
    own = {"pid": os.getpid(), "host": platform.node(), "token": secrets.token_hex(8)}
    try:
        locked = lock(file, run, "trained")
    except Held as error:
        raise _named(run, _read(file)) or error from None
    before = _read(file)
    if before is not None and before["host"] != own["host"]:
        warnings.warn(
            f"process {before['pid']} on {before['host']} trained {run} and did not end its run; if it still does, end "
            "one of the two: the locks of some network file systems hold on one machine only",
            UserNote,
            stacklevel=6,
        )
    elif before is not None and not locked and before["pid"] != own["pid"] and _runs(before["pid"]):
        raise Held(f"{_named(run, before)}; if that process is another one, remove {run / LOCK}")
    with suppress(OSError):  # it only informs
        file.truncate(0)
        file.write(json.dumps(own) + "\n")
        file.flush()
    return own


def _named(run: Path, record: dict[str, Any] | None) -> Held | None:
    if record is None:
        return None
    place = f"process {record['pid']} on {record['host']}"
    return Held(f"{run} is being trained by {place}; wait for its end, or end it")


def _read(file: IO[str]) -> dict[str, Any] | None:
    """What a lock file says; None where that is nothing, as after a run that ended."""
    try:
        file.seek(0)
        record = json.loads(file.read(4096))
        return {"pid": int(record["pid"]), "host": str(record["host"]), "token": str(record["token"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _runs(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def _is_ours(path: Path, holding: _Holding) -> bool:
    """Whether the lock file that is at `path` now is the one that this process holds."""
    try:
        if os.path.samestat(os.stat(path), os.fstat(holding.file.fileno())):
            return True
        # Another file, or a file system that numbers a file anew from time to time.
        with open(path, encoding="utf-8", errors="replace") as file:
            record = _read(file)
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return False
    except OSError:  # the disk has another fault, which the next write tells
        return True
    ours = record == holding.record
    if ours:
        lock(holding.file, path, "trained")  # closing the file has released it
    return ours


def check_run_folder(out: str) -> Path:
    """The path of a run folder that does not exist yet or is empty, but for the lock file.

    Raises:
        UserError: it is a folder with files in it, or a file.
    """
    check_source("out", out)
    path = Path(out)
    check_parent("out", path)
    check_utf8("out", path, "TensorBoard")
    if path.exists() and not path.is_dir():
        raise UserError(f"out is {out}, a file; it must be a folder that is new or empty")
    if path.is_dir() and any(entry.name != LOCK for entry in path.iterdir()):
        raise UserError(f"out is {out}, which is not empty; a run is never overwritten: name a new folder or remove it")
    return path


def make_run_folder(config: TrainConfig) -> Path:
    """Create the folder of `config.out`, or runs/DATA-LOSS-TIME where that is None.

    Raises:
        UserError: the folder has files in it, or cannot be made.
    """
    if config.out is not None:
        path = check_run_folder(config.out)
        _make(path, exist_ok=True)
        return path
    stem = f"{config.data.name}-{config.loss_title}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        path = Path("runs") / f"{stem}{suffix}"
        try:
            _make(path, exist_ok=False)
        except FileExistsError:  # another run that started within this second
            continue
        return path
    raise UserError(f"out is null, and runs/{stem} and 98 names like it are taken; give out")


def _make(path: Path, *, exist_ok: bool) -> None:
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(f"out is {path}, which cannot be made: {error.strerror}; name a folder that can") from error
