"""Files that are written whole or not at all, and by one process at a time."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes from writing the same
    fcntl = None  # type: ignore[assignment]

from gcahng.errors import UserError


class CannotWrite(UserError):
    """A file of a run cannot be written: the disk is full, the folder read-only."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into one line.

    Raises:
        CannotWrite: names `path` and the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written: {error.strerror or error}") from error


def check_folder(out: Path) -> None:
    """Before the work that `out` is to hold.

    Raises:
        UserError: its folder is a file.
    """
    if out.parent.exists() and not out.parent.is_dir():
        raise UserError(f"out is {out}; {out.parent} is a file, not a folder")


def atomic_write(path: Path, write: Callable[[BinaryIO], object], *, previous: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it to `path`; its folder is
    made where there is none.

    Whoever reads `path`, even after a crash at any point, finds the old content or the new one.

    Args:
        path: the file.
        write: is handed the open temporary file.
        previous: where the old content of `path` is kept. Between two renames there is then no `path` for a moment, but
            the old content is whole under this name.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the rename itself reaches the disk; not a notion of Windows
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """`atomic_write` of UTF-8 text; bytes of file names that are no UTF-8 are written as they were."""
    atomic_write(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """`atomic_write` of indented JSON."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def remove_temporaries(folder: Path) -> None:
    """Remove what `atomic_write` left in a folder when its process was killed."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def lock(file: IO[Any], path: Path, done: str) -> None:
    """Hold an open file for this process until it is closed.

    Args:
        file: open for writing.
        path: what it stands for, and `done`, what this process does with that, for messages.

    Raises:
        UserError: another process holds it.
    """
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{path} is being {done} by another process; wait for its end, or end it") from None
    except OSError as error:  # some network file systems know no locks
        warnings.warn(f"{path} cannot be locked ({error.strerror}); let no second process use it", stacklevel=4)
