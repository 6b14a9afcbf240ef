"""Copies of the source folder, for tests that build and install gcahng."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "csrc",
    "gcahng",
    "kernels",
    "third_party",
    "setup.py",
    "CMakeLists.txt",
    "MANIFEST.in",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "THIRD_PARTY_NOTICES.md",
)
SETTINGS = ("GCAHNG_NATIVE", "GCAHNG_CUDA", "CXX", "CUDACXX", "CMAKE_ARGS", "MAX_JOBS")
"""Environment variables that change a build."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, so that the build writes nothing into the source folder."""
    folder = tmp_path / "source"
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_native_build.json")
    for name in NEEDED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(path, folder / name)
    return folder
