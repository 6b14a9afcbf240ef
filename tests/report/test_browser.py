"""The page in a real browser: its parts show, nothing is loaded, the console stays empty, nothing is cut off.

Needs Chromium (GCAHNG_BROWSER names another copy of it) and playwright, which drives it. GCAHNG_SCREENSHOTS names a
folder where the screenshots are kept.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import Open
from PIL import Image

from gcahng.report import write_report

pytestmark = [pytest.mark.browser, pytest.mark.processes]
PARTS = ("results", "curves", "negatives", "queries", "confused", "map", "options")


@pytest.fixture(scope="module")
def report(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gcahng.report.contents.load_data", lambda config: runs.data)
        out = tmp_path_factory.mktemp("report") / "page.html"
        return write_report(runs.run, out, baselines=[runs.baseline], map_method="pca", queries=2, device="cpu")


@pytest.fixture
def opened(tab: Open, report: Path) -> Iterator[Any]:
    """The page, which loads nothing but itself."""
    with tab(report.as_uri()) as page:
        page.goto(report.as_uri())
        yield page


def colors(screenshot: bytes) -> int:
    """How many colors a screenshot has: one for an empty part."""
    picture = Image.open(io.BytesIO(screenshot)).convert("RGB")
    return len(picture.getcolors(maxcolors=picture.width * picture.height))


def test_every_part_shows_and_fits(opened: Any) -> None:
    width = opened.viewport_size["width"]
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    assert [part.get_attribute("id") for part in opened.locator("section").all()] == list(PARTS)
    for part in PARTS:
        section = opened.locator(f"#{part}")
        box = section.bounding_box()
        assert box["height"] > 50 and box["x"] >= 0 and box["x"] + box["width"] <= width
        assert colors(section.screenshot()) > 10
    # Every picture is decoded, and every chart is drawn within the page.
    assert opened.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    for chart in opened.locator("svg").all():
        box = chart.bounding_box()
        assert box["width"] > 200 and box["x"] + box["width"] <= width
    texts = "[...document.querySelectorAll('h1, h2, h3, figcaption, .key, .pair, .cards div')]"
    assert opened.evaluate(f"{texts}.filter((e) => e.scrollWidth > e.clientWidth + 1).length") == 0
    folder = os.environ.get("GCAHNG_SCREENSHOTS")
    if folder:
        opened.screenshot(path=Path(folder) / f"report-{width}.png", full_page=True)


def test_the_map_shows_images(opened: Any, runs: Any) -> None:
    tip = opened.locator("#tip")
    assert not tip.is_visible()
    point = opened.locator(".map circle").nth(3)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip.is_visible()
    # Class 0 is called <script>…: it is shown as text, and no dialog opened.
    name = opened.locator("#tip-name").inner_text()
    assert name in runs.data.test.class_names and opened.locator("#tip-note").inner_text().startswith("image ")
    assert colors(opened.locator("#thumb").screenshot()) > 50
    assert opened.locator(".map circle.here").count() == 1 and opened.locator(".map circle.same").count() == 5
    tip_box, map_box = tip.bounding_box(), opened.locator(".map").bounding_box()
    assert map_box["x"] <= tip_box["x"] and tip_box["x"] + tip_box["width"] <= map_box["x"] + map_box["width"]

    opened.locator(".map svg").focus()
    shown = []
    for _ in range(3):
        opened.keyboard.press("ArrowRight")
        shown.append(opened.locator("#tip-note").inner_text())
    assert len(set(shown)) == 3
    opened.keyboard.press("Escape")
    assert not tip.is_visible()


def test_the_thumbnail_is_the_points_own(opened: Any, runs: Any) -> None:
    """The sprite is placed so that the middle of the thumbnail shows the middle of the image."""
    opened.locator(".map svg").focus()
    opened.keyboard.press("ArrowRight")
    for index in range(1, 36):
        opened.keyboard.press("ArrowRight")
        if index in (1, 31, 32, 35):  # ends and beginnings of the sprite's rows
            assert opened.locator("#tip-note").inner_text() == f"image {index}"
            shown = Image.open(io.BytesIO(opened.locator("#thumb").screenshot())).convert("L")
            image = runs.data.test.images[index]
            scale = shown.width / 32
            for row, column in ((3, 5), (16, 16), (27, 20)):
                pixel = shown.getpixel((round((column + 0.5) * scale), round((row + 0.5) * scale)))
                assert abs(pixel - int(image[row, column])) <= 3


def test_dark_and_light(browser: Any, report: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(report.as_uri())
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    light, dark = (sum(map(int, color[4:-1].split(","))) for color in grounds)
    assert light > 600 and dark < 150
