"""Takes the screenshots of the documentation: of its site, to look at, and of a run's report, for docs/report.md.

    python docs/site/screenshots.py site FOLDER          # builds the site; each page at desktop and phone width
    python docs/site/screenshots.py report runs/gca/report.html docs/images/report.png

Needs playwright (the extra "test") and Chromium; GCAHNG_BROWSER names another copy of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
REPORT = (1280, 1060)


def chromium() -> str | None:
    """The path of the browser, or None if there is none."""
    return os.environ.get("GCAHNG_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, as playwright drives it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Containers have no user namespaces for the sandbox; the pages are our own.
        started = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


def build(out: Path) -> subprocess.CompletedProcess[str]:
    """Builds the site, strictly, into a folder. MkDocs 2 is not used, so its announcement is left out."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def shoot(opened: Any, source: Path, out: Path, size: tuple[int, int], *, whole: bool = False) -> None:
    """Takes a screenshot of a file at a size: of what is in view, or of the whole page."""
    page = opened.new_page(viewport={"width": size[0], "height": size[1]})
    page.goto(source.as_uri())
    page.screenshot(path=out, full_page=whole)
    page.close()


def main(what: str, *paths: str) -> int:
    if what == "report":
        with browser() as opened:
            shoot(opened, Path(paths[0]).resolve(), Path(paths[1]), REPORT)
        return 0
    out = Path(paths[0])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        built = build(Path(folder))
        if built.returncode:
            print(built.stderr, file=sys.stderr)
            return 1
        for page in sorted(Path(folder).rglob("*.html")):
            place = page.relative_to(folder)
            if place.parts[0] != "source":
                for name, size in SIZES.items():
                    file = "-".join([*place.with_suffix("").parts, name])
                    shoot(opened, page, out / f"{file}.png", size, whole=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
