"""A real browser for the tests that look at pages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SITE = Path(__file__).parents[1] / "docs" / "site"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
Open = Callable[[str], AbstractContextManager[Any]]


@pytest.fixture(scope="session")
def screenshots() -> ModuleType:
    """docs/site/screenshots.py: it builds the site and drives a browser."""
    sys.path.insert(0, str(SITE))
    try:
        import screenshots
    finally:
        sys.path.remove(str(SITE))
    return screenshots


@pytest.fixture(scope="module")
def browser(screenshots: ModuleType) -> Iterator[Any]:
    """Chromium. Without it, or without playwright, the test is skipped."""
    if screenshots.chromium() is None:
        pytest.skip("no Chromium; apt-get install chromium, or name one in GCAHNG_BROWSER")
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install playwright")
    with screenshots.browser() as started:
        yield started


@pytest.fixture(params=SIZES)
def tab(request: pytest.FixtureRequest, browser: Any) -> Open:
    """Opens a tab at a size: `with tab(allowed) as page`.

    At the end its console is empty, and it has asked for nothing but data and what begins with `allowed`.
    """
    width, height = SIZES[request.param]

    @contextmanager
    def opened(allowed: str) -> Iterator[Any]:
        page = browser.new_page(viewport={"width": width, "height": height}, has_touch=request.param == "phone")
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda wanted: asked.append(wanted.url))
        yield page
        page.close()
        assert said == []
        assert not [url for url in asked if not url.startswith((allowed, "data:", "blob:"))]

    return opened
