"""The documentation's site, built once for the tests that look at it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, screenshots: ModuleType) -> Path:
    """The site's folder. The build is strict, so a warning fails it; and it writes nothing into docs/."""
    out = tmp_path_factory.mktemp("site")
    built = screenshots.build(out)
    said = built.stdout + built.stderr
    assert "No module named mkdocs" not in said, 'mkdocs is not installed; pip install -e ".[docs]" brings it'
    assert built.returncode == 0, said
    assert "WARNING" not in said and "ERROR" not in said, said
    return out
