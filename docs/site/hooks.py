"""What MkDocs does beyond its settings in mkdocs.yml.

The pages of docs/ are written for GitHub. Here

- README.md, CONTRIBUTING.md and CHANGELOG.md of the repository become pages, and README.md the site's first;
- a link to any other file of the repository leads to a page that shows the file, so that the site needs no host;
- headings get the anchors that GitHub gives them;
- the API gets a page for each public module (docs/site/api.py);
- "FOLDER/*.md" in the navigation stands for the pages of the folder.

Nothing of this is written to docs/.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))  # MkDocs loads this file by its path
import api

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
BOOSTS = {"troubleshooting.md": 100, "api/": 0.5}  # in search: who pastes a message looks for this page
SHOWN = "source"  # the site's folder for files of the repository that are no pages
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\[[^\]]*\]\()([^)\s]+)(\))")
TABLE_ROW = re.compile(r"^\|.*$", re.MULTILINE)
CODE = re.compile(r"`[^`]+`")  # GitHub needs a backslash before a bar in a table's code, and MkDocs would show it
LANGUAGES = {".cpp": "cpp", ".h": "cpp", ".cu": "cuda", ".json": "json", ".py": "python", ".yaml": "yaml"}


def github_anchor(title: str, separator: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", separator)


def site_place(path: str) -> str:
    """Where the site has a file or folder of the repository, as a source of MkDocs.

    Args:
        path: from the root of the repository, with slashes.
    """
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in PAGES:
        return PAGES[path]
    if (ROOT / path).is_dir():
        return f"{SHOWN}/{path}/index.md"
    return f"{SHOWN}/{path}" if path.endswith(".md") else f"{SHOWN}/{path}.md"


def repository_place(source: str) -> str:
    """The file of the repository that a page was made from: the reverse of `site_place` for pages of Markdown."""
    for path, page in PAGES.items():
        if source == page:
            return path
    return source.removeprefix(f"{SHOWN}/") if source.startswith(f"{SHOWN}/") else f"docs/{source}"


def target(link: str, page: str) -> tuple[str, str] | None:
    """The file or folder of the repository that a link leads to, and its anchor with "#"; None for any other link.

    Args:
        link: as it is written.
        page: the place of its page in the repository.
    """
    if re.match(r"[a-z]+:|#", link):
        return None
    path, mark, anchor = link.partition("#")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)), mark + anchor


def shown(path: str) -> str:
    """The page that shows a file or a folder of the repository."""
    place = ROOT / path
    hidden = "---\nsearch:\n  exclude: true\n---\n"
    if place.is_dir():
        names = sorted(entry.name for entry in place.iterdir() if entry.suffix in LANGUAGES)
        return f"{hidden}# {path}\n\n" + "".join(f"- [{name}]({name}.md)\n" for name in names)
    text = place.read_text(encoding="utf-8")
    if place.suffix == ".md":
        return hidden + text
    return f"{hidden}# {path}\n\n``````{LANGUAGES.get(place.suffix, 'text')}\n{text.rstrip()}\n``````\n"


def linked_outside(text: str, page: str) -> set[str]:
    """The files and folders that a page links to and that the site has no page for; with a folder, its files."""
    found = set()
    for _, link, _ in LINK.findall(FENCE.sub("", text)):
        place = target(link, page)
        if place and not place[0].startswith("docs/") and place[0] not in PAGES and (ROOT / place[0]).exists():
            found.add(place[0])
    return found


def add_linked_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages of all files that pages link to, and of those that these link to in turn."""
    waiting = {file.src_uri: file.content_string for file in files.documentation_pages()}
    done: set[str] = set()
    while waiting:
        source, text = waiting.popitem()
        for path in linked_outside(text, repository_place(source)) - done:
            done.add(path)
            content = shown(path)
            files.append(File.generated(config, site_place(path), content=content))
            if path.endswith(".md"):
                waiting[site_place(path)] = content
            elif (ROOT / path).is_dir():
                for _, name, _ in LINK.findall(content):
                    inner = f"{path}/{name.removesuffix('.md')}"
                    if inner not in done:
                        done.add(inner)
                        files.append(File.generated(config, site_place(inner), content=shown(inner)))


def expand(nav: list[Any], pages: list[str]) -> list[Any]:
    """The navigation with the pages of a folder in place of each "FOLDER/*.md"."""
    named = {entry for entry in flat(nav) if not entry.endswith("/*.md")}
    result: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            entry = {
                title: expand(inner, pages) if isinstance(inner, list) else inner for title, inner in entry.items()
            }
        if isinstance(entry, str) and entry.endswith("/*.md"):
            folder = entry.removesuffix("*.md")
            result += [page for page in pages if page.startswith(folder) and page not in named]
        else:
            result.append(entry)
    return result


def flat(nav: list[Any]) -> list[str]:
    """Every page that the navigation names."""
    entries: list[str] = []
    for entry in nav:
        inner = list(entry.values())[0] if isinstance(entry, dict) else entry
        entries += flat(inner) if isinstance(inner, list) else [inner]
    return entries


def on_config(config: MkDocsConfig) -> None:
    """Settings that YAML cannot hold."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = github_anchor
    config.mdx_configs["toc"]["separator"] = "-"
    docs = Path(config.docs_dir)
    pages = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    config.nav = expand(config.nav, [*pages, *(api.place(module) for module in api.modules(ROOT))])


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages that are not in docs/."""
    index = files.get_file_from_path("README.md")
    index.dest_uri = index.url = "pages.html"  # the site's first page is the repository's README
    for path, source in PAGES.items():
        files.append(File.generated(config, source, content=(ROOT / path).read_text(encoding="utf-8")))
    documented: set[str] = set()
    for module in api.modules(ROOT):
        files.append(File.generated(config, api.place(module), content=api.page(ROOT, module, documented)))
    add_linked_files(files, config)
    for file in files.documentation_pages():
        if file.src_uri.startswith(f"{SHOWN}/"):
            file.inclusion = file.inclusion.NOT_IN_NAV


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links within the repository into links within the site."""
    source = page.file.src_uri
    for place, boost in BOOSTS.items():
        if source.startswith(place):
            page.meta["search"] = {"boost": boost}
    if source.startswith("api/") or (source.startswith(f"{SHOWN}/") and not (ROOT / repository_place(source)).exists()):
        return markdown  # written for the site
    origin = repository_place(source)

    def rewritten(found: re.Match[str]) -> str:
        place = target(found[2], origin)
        if place is None:
            return found[0]
        relative = posixpath.relpath(site_place(place[0]), posixpath.dirname(source) or ".")
        return f"{found[1]}{relative}{place[1]}{found[3]}"

    markdown = TABLE_ROW.sub(lambda row: CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0]), markdown)
    parts = FENCE.split(markdown)  # every second part is a fenced block
    parts[::2] = [LINK.sub(rewritten, part) for part in parts[::2]]
    return "".join(parts)
