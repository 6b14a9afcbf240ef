"""Files that are written whole or not at all, and by one process at a time."""

from __future__ import annotations

import errno
import json
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

try:
    import fcntl
except ImportError:  # on Windows nothing stops two processes from writing the same file
    fcntl = None  # type: ignore[assignment]

from gcahng.errors import UserError, UserNote

# What file systems answer that have no fsync, or none of folders: CIFS, 9p and several FUSE among them. The data may
# well have reached the disk. EIO, ENOSPC and others say that it has not.
_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_FOLDER_FSYNC = _NO_FSYNC | {errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM}
_said = set[str]()


class CannotWrite(UserError):
    """A file cannot be written: the disk is full, or the folder is read-only."""


class Held(UserError):
    """Another process holds a file."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into an error of one line.

    Args:
        path: what is written.

    Raises:
        CannotWrite: names `path` and the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written: {error.strerror or error}") from error


def regular_file(path: Path) -> Path:
    """The path of a file that is opened for reading, once it is known to be a regular file.

    Opening a named pipe waits until another process writes to it, and a device such as /dev/zero has no end.

    Raises:
        OSError: there is no regular file at `path`; its strerror says what there is.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        raise OSError(errno.EINVAL, f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a regular file", str(path))
    return path


def atomic_write(path: Path, write: Callable[[BinaryIO], object], *, previous: Path | None = None) -> None:
    """Write a file whole or not at all: whoever reads it, even after a crash, finds its old content or its new one.

    A temporary file beside `path` is filled, flushed to the disk and renamed to `path`.

    Args:
        path: the file; its folder is made where there is none.
        write: called with the open temporary file, which it fills.
        previous: what the old file is renamed to; None: it is replaced. Between the two renames `path` does not exist
            for a moment, but the old content is whole under this name.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            sync(file, path)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the error that is on its way says more
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def sync(file: IO[Any], path: Path) -> None:
    """Bring what was written to an open file to the disk.

    A file system that cannot do so is named in one warning, because a power cut may lose files there.

    Args:
        file: open for writing, and flushed.
        path: what the warning names.

    Raises:
        OSError: the disk is full or broken.
    """
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
        _say_once("files", path, error)


def _sync_folder(folder: Path) -> None:
    """Bring the names of the files in a folder to the disk.

    When this is called, the file is in its place. So a file system that cannot do it, or a folder that may only be
    written to, is no reason to stop.
    """
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
        _say_once("folders", folder, error)


def _say_once(what: str, path: Path, error: OSError) -> None:
    if what not in _said:
        _said.add(what)
        warnings.warn(
            f"{path} cannot be flushed to the disk ({error.strerror}); it is written, but a power cut may lose it, and "
            f"so it is with other {what} on this file system",
            UserNote,
            stacklevel=4,
        )


def write_text(path: Path, text: str) -> None:
    """`atomic_write` of text in UTF-8; bytes of file names that are invalid UTF-8 are written unchanged."""
    atomic_write(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """`atomic_write` of indented JSON."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def remove_temporaries(folder: Path) -> None:
    """Remove what `atomic_write` left in a folder when its process was killed."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def lock(file: IO[Any], path: Path, done: str) -> bool:
    """Hold an open file for this process until it is closed.

    Args:
        file: open for writing.
        path: what the file stands for, as messages name it.
        done: what this process does with that, a participle such as "written".

    Returns:
        Whether it is held; False, with a warning, where the file system knows no locks.

    Raises:
        Held: another process holds the file.
    """
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise Held(f"{path} is being {done} by another process; wait for its end, or end it") from None
    except OSError as error:  # some network file systems
        warnings.warn(
            f"{path} cannot be locked ({error.strerror}); let no second process use it", UserNote, stacklevel=4
        )
        return False
    return True
