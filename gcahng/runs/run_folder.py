"""The folder of a run: made new, never over another run, and held by one process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gcahng.config import TrainConfig
from gcahng.errors import UserError
from gcahng.files import lock, writing


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold a run folder for this process; the system releases it when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
        CannotWrite: the folder is read-only.
    """
    path = run / ".lock"
    with writing(path):
        file = open(path, "a")  # noqa: SIM115  # closed below
    with file:
        lock(file, run, "trained")
        yield


def check_run_folder(out: str) -> Path:
    """The path of a run folder that does not exist yet or is empty.

    Raises:
        UserError: it is a folder with files in it, or a file.
    """
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise UserError(f"out is {out}, a file; it must be a folder that is new or empty")
    if path.is_dir() and any(path.iterdir()):
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
