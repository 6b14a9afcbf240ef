"""Files are written whole or not at all, also on file systems that refuse to flush, to rename or to lock."""

from __future__ import annotations

import errno
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gcahng import files
from gcahng.files import CannotWrite, atomic_write, write_text, writing


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_said", set())


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, number: int, when: Callable[..., bool]) -> None:
    """Let calls of `os.NAME` fail with an error number, as those of a file system would."""
    real = getattr(os, name)

    def call(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, call)


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def is_file(descriptor: int) -> bool:
    return not is_folder(descriptor)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_folders_that_cannot_be_flushed(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFS and some FUSE answer so. It is said once."""
    refuse(monkeypatch, "fsync", number, is_folder)
    with pytest.warns(UserWarning, match=r"cannot be flushed to the disk .*other folders on this file system") as said:
        for text in ("one", "two"):
            write_text(tmp_path / "a" / "file", text)
    assert len(said) == 1
    assert [path.read_text() for path in (tmp_path / "a").iterdir()] == ["two"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_folders_that_may_not_be_read(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "open", number, lambda path, *_: True)
    with pytest.warns(UserWarning, match="cannot be flushed to the disk"):
        write_text(tmp_path / "file", "one")
    assert (tmp_path / "file").read_text() == "one"


def test_files_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "fsync", errno.EINVAL, is_file)
    with pytest.warns(UserWarning, match="so it is with other files on this file system") as said:
        for text in ("one", "two"):
            write_text(tmp_path / "file", text)
    assert len(said) == 1 and (tmp_path / "file").read_text() == "two"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EBADF])
def test_a_disk_that_fails_is_an_error(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "file", "old")
    refuse(monkeypatch, "fsync", number, is_file)
    with warnings.catch_warnings(), pytest.raises(CannotWrite, match=f"file cannot be written: {os.strerror(number)}"):
        warnings.simplefilter("error")
        with writing(tmp_path / "file"):
            write_text(tmp_path / "file", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_a_folder_on_a_broken_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "fsync", errno.EIO, is_folder)
    with pytest.raises(CannotWrite, match="Input/output error"), writing(tmp_path / "file"):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EROFS, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("cleans_up", [True, False])
def test_a_rename_that_fails(number: int, cleans_up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason that is told is the rename's, also where nothing can be removed either."""
    write_text(tmp_path / "file", "old")
    refuse(monkeypatch, "replace", number, lambda *_: True)
    if not cleans_up:
        refuse(monkeypatch, "unlink", errno.EBUSY, lambda *_: True)
    with pytest.raises(CannotWrite, match=os.strerror(number)), writing(tmp_path / "file"):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == (1 if cleans_up else 2)


def test_a_second_rename_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "last", "old")
    refuse(monkeypatch, "replace", errno.ESTALE, lambda _, target: str(target).endswith("last"))
    with pytest.raises(OSError, match="[Ss]tale"):
        atomic_write(tmp_path / "last", lambda file: file.write(b"new"), previous=tmp_path / "previous")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"previous": "old"}
