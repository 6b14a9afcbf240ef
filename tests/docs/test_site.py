"""The built site: complete, whole in itself, and the same text as on GitHub."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from doc_pages import PAGES, ROOT, anchors, read

pytestmark = pytest.mark.processes
RENAMED = {
    "README.md": "index",
    "docs/README.md": "pages",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
}
TAGS = {"h1", "h2", "h3", "h4", "li", "ul", "ol", "tr", "td", "th", "table", "pre", "p", "img", "code", "em", "strong"}
HIDDEN = {"script", "style", "nav", "button"}


def site_name(page: Path) -> str | None:
    """The name of a page on the site, without its suffix; None if it has no page of its own."""
    name = page.relative_to(ROOT).as_posix()
    if name in RENAMED:
        return RENAMED[name]
    return name.removeprefix("docs/").removesuffix(".md") if name.startswith("docs/") else None


SHOWN = {name: page for page in PAGES if (name := site_name(page))}


class Reader(HTMLParser):
    """Reads a page: its links and ids, and its text with the tags that structure it.

    Attributes:
        links: values of href and src.
        ids: values of id.
        parts: text and tags, of the article alone if there is one.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.parts: list[str] = []
        self.reading = "<article" not in text
        self.hidden = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [values[name] for name in ("href", "src") if values.get(name)]
        if values.get("id"):
            self.ids.add(values["id"])
        self.reading |= tag == "article"
        self.hidden += tag in HIDDEN
        if self.reading and not self.hidden and tag in TAGS:
            self.parts.append(f"<{tag}>")

    def handle_endtag(self, tag: str) -> None:
        self.reading &= tag != "article"
        self.hidden -= tag in HIDDEN

    def handle_data(self, data: str) -> None:
        if self.reading and not self.hidden:
            self.parts.append(data)

    def content(self) -> str:
        """The text and its tags, without what renderers do differently and nobody sees."""
        text = "".join(self.parts).replace("¶", "").replace("<pre><code>", "<pre>")
        text = re.sub(r"(<li>)\s*<p>", r"\1", text)
        return re.sub(r" ?(<\w+>) ?", r"\1", re.sub(r"\s+", " ", text)).strip()


@cache
def reader(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SHOWN)
def test_a_page_reads_as_on_github(site: Path, name: str) -> None:
    """The site's Markdown is not GitHub's: lists, tables and emphasis must mean the same in both."""
    from markdown_it import MarkdownIt

    text = re.sub(r"<!--.*?-->", "", read(SHOWN[name]), flags=re.DOTALL)
    expected = Reader(MarkdownIt("commonmark").enable("table").render(text)).content()
    assert reader(site / f"{name}.html").content() == expected


@pytest.mark.parametrize("name", SHOWN)
def test_headings_have_githubs_anchors(site: Path, name: str) -> None:
    assert anchors(SHOWN[name]) <= reader(site / f"{name}.html").ids


def test_links_lead_somewhere_on_the_site(site: Path) -> None:
    broken = []
    for page in site.rglob("*.html"):
        for link in reader(page).links:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            other = (page.parent / unquote(path)).resolve() if path else page
            if not other.is_file() or not other.is_relative_to(site):
                if page.name != "404.html":  # it has links from the root of the host
                    broken.append(f"{page.relative_to(site)}: {link}")
            elif anchor and other.suffix == ".html" and unquote(anchor) not in reader(other).ids:
                broken.append(f"{page.relative_to(site)}: {link}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    elsewhere = re.compile(r"<(?:script|img|iframe|source)[^>]+(?:src|srcset)=[\"']?(?:https?:)?//")
    styles = re.compile(r"<link[^>]+rel=[\"']?(?:stylesheet|preconnect|preload)[^>]+(?:https?:)?//")
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not elsewhere.search(text) and not styles.search(text), page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text(encoding="utf-8")), style


def test_the_site_holds_no_scripts_of_docs(site: Path) -> None:
    assert not [*site.rglob("*.py"), *site.rglob("*.pyc"), *site.rglob("*.md"), *(site / "images").glob("*.json")]


def test_search_knows_every_page(site: Path) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    found = {entry["location"].partition("#")[0].removesuffix(".html") for entry in entries}
    assert set(SHOWN) <= found
    assert not [name for name in found if name.startswith("source/")]
    assert (site / "search" / "search_index.js").is_file()  # what a page that is a file can load


def test_the_api_has_every_public_name(site: Path) -> None:
    ids = set().union(*(reader(page).ids for page in (site / "api").glob("*.html")))
    names = set()
    for module in ("", "/ops", "/nn", "/data", "/retrieval", "/train", "/report", "/testing"):
        tree = ast.parse(read(ROOT / "gcahng" / module[1:] / "__init__.py"))
        (exported,) = (n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
        prefix = f"gcahng{module.replace('/', '.')}"
        names |= {f"{prefix}.{name}" for name in ast.literal_eval(exported.value) if not name.startswith("_")}
    assert len(names) >= 50
    assert not names - ids
    pages = {page.stem for page in (site / "api").glob("*.html")}
    modules = {path.stem for path in (ROOT / "gcahng" / "integrations").glob("*.py")} - {"__init__"}
    assert {f"gcahng.integrations.{name}" for name in modules if not name.startswith("_")} <= pages
