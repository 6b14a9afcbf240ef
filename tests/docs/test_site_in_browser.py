"""The site in a real browser, from files: it fits a desktop and a phone, loads nothing else, and its search answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import Open

pytestmark = [pytest.mark.browser, pytest.mark.processes]
SEARCHES = {  # words, and the page that must be among the answers
    "edge_memory recompute": "engine.html",
    "no cmake": "troubleshooting.html",
    "retrieval_metrics": "api/gcahng.retrieval.html",
    "torchrun": "several_devices.html",
}


@pytest.fixture
def opened(tab: Open, site: Path) -> Iterator[Any]:
    """A tab that loads nothing but files of the site."""
    with tab(site.as_uri()) as page:
        yield page


def test_every_page_fits(opened: Any, site: Path) -> None:
    width = opened.viewport_size["width"]
    pages = [path for path in sorted(site.rglob("*.html")) if "source" not in path.parts and path.name != "404.html"]
    for path in [*pages, site / "source" / "gcahng" / "dispatch.py.html"]:
        opened.goto(path.as_uri())
        assert opened.evaluate("document.documentElement.scrollWidth") == width, path
        assert opened.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)"), path
        # What is wider than the page scrolls by itself: nothing is cut off.
        cut = """[...document.querySelectorAll('article *')].filter((e) => {
            const box = e.getBoundingClientRect()
            const outer = e.closest('.md-typeset__scrollwrap, pre, code, .highlight, .md-code__nav')
            return box.width > 0 && box.right > innerWidth + 1 && !outer
        }).map((e) => e.outerHTML.slice(0, 80))"""
        assert opened.evaluate(cut) == [], path


def test_search_answers_without_a_network(opened: Any, site: Path) -> None:
    opened.goto((site / "index.html").as_uri())
    if opened.viewport_size["width"] < 960:
        opened.locator("label.md-header__button[for=__search]").click()
    field = opened.locator("input.md-search__input")
    for words, page in SEARCHES.items():
        field.fill("")
        field.press_sequentially(words)
        answer = opened.locator(f"a.md-search-result__link[href*='{page}']").first
        answer.wait_for(timeout=20_000)
    answer.click()
    opened.wait_for_url(f"**/{page}?h=*")  # where the words are marked
    assert opened.locator("article mark").count() >= 1


def test_dark_and_light(browser: Any, site: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto((site / "how_it_works.html").as_uri())
        page.wait_for_timeout(200)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    light, dark = (sum(map(int, color[4:-1].split(",")[:3])) for color in grounds)
    assert light > 600 and dark < 200
