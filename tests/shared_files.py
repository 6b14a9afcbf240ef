"""Files that are dear to make, and that all processes of one run of the tests share (a pytest plugin)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

FOLDER = "GCAHNG_TESTS_SHARE"  # an environment variable, which workers and the processes of a test inherit


def pytest_configure(config: pytest.Config) -> None:
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="gcahng-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True))


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The shared file of this name, which the first process that asks for it makes; others wait for it.

    Without pytest it is made for this process alone.
    """
    if FOLDER not in os.environ:
        os.environ[FOLDER] = _own()
    path = Path(os.environ[FOLDER]) / name
    turn = FileBaton(f"{path}.lock")
    while not path.exists():
        if not turn.try_acquire():
            turn.wait()
            continue
        try:
            if not path.exists():  # since the turn came
                make(path.with_suffix(".new"))
                path.with_suffix(".new").rename(path)  # nobody sees a part
        finally:
            turn.release()
    return path


_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def _own() -> str:
    _folders.append(tempfile.TemporaryDirectory(prefix="gcahng-tests-"))
    return _folders[-1].name
