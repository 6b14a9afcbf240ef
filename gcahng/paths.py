"""Paths that a user names: what is wrong with one is said before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from gcahng.errors import UserError

_SHOWN = 200
# What `gcahng.files.atomic_write` puts around the name of a file for its temporary file: .NAME.PID.tmp
_TEMPORARY = "." * 16


def check_source(name: str, path: Path | str) -> None:
    """Check the path of something that is read; that it is missing is for the reader to say.

    Args:
        name: of the argument, for messages.
        path: a file or a folder.

    Raises:
        UserError: no file and no folder can be at `path`, a link there leads nowhere, or what is there may not be read.
    """
    _check_name(name, path)
    rights = os.R_OK | os.X_OK if os.path.isdir(path) else os.R_OK
    if os.path.exists(path) and not os.access(path, rights):
        raise UserError(f"{name} is {shown_path(path)}, which cannot be read: Permission denied")


def check_target(name: str, path: Path | str) -> None:
    """Check the path of a file that is to be written, before the work whose result it is to hold.

    Folders on the way to it that do not exist yet are made when it is written.

    Args:
        name: of the argument, for messages.
        path: the file, which may exist.

    Raises:
        UserError: no file can be written at `path`.
    """
    _check_name(name, path)
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{name} is {shown_path(path)}, a folder; it must be a file")
    if path.exists() and not path.is_file():
        raise UserError(
            f"{name} is {shown_path(path)}, which is no regular file; it must be a new file or one to replace"
        )
    _check_name(name, path.with_name(path.name + _TEMPORARY))
    check_parent(name, path)


def check_parent(name: str, path: Path) -> None:
    """Check that a file or a folder can be made at `path`, as far as the folders above it tell.

    Raises:
        UserError: names the argument `name` and the folder that is in the way.
    """
    parent = next((folder for folder in path.parents if os.path.lexists(folder)), Path())
    problem = None
    if not parent.exists():
        problem = f"is a link to {_target(parent)}, which does not exist"
    elif not parent.is_dir():
        problem = "is a file, not a folder"
    elif not path.exists() and not os.access(parent, os.W_OK | os.X_OK):
        problem = "cannot be written to: Permission denied"
    if problem is not None:
        raise UserError(f"{name} is {shown_path(path)}; {shown_path(parent)} {problem}")


def check_utf8(name: str, path: Path | str, library: str) -> None:
    """Check the path of what a library is to open that takes text alone; other bytes are allowed in names on Unix.

    Raises:
        UserError: the path is not UTF-8.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{name} is {shown_path(path)}, which is not UTF-8; it must be, because {library} takes no other name"
        ) from None


def shown_path(path: Path | str) -> str:
    """A path as messages show it: the middle of a long one is left out, and what cannot be printed is escaped."""
    text = os.fspath(path)
    if not text.isprintable() or text != text.strip():
        text = repr(text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}…{text[-_SHOWN // 4 :]}"


def _check_name(name: str, path: Path | str) -> None:
    text = os.fspath(path)
    if not text:
        raise UserError(f"{name} is empty; it must name a file or a folder")
    if "\0" in text:
        raise UserError(f"{name} is {shown_path(path)}, which has a zero byte; no path can have one")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise UserError(f"{name} is {shown_path(path)}, a link to {_target(path)}, which does not exist") from None
    except (OSError, UnicodeError) as error:  # too long a name, a loop of links, a folder that may not be searched
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{name} is {shown_path(path)}, which cannot be used: {reason}") from None


def _target(link: Path | str) -> str:
    return shown_path(os.readlink(link))
