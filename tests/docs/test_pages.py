"""README and docs say what is so: links lead somewhere, and files, commands and options exist."""

import contextlib
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest
from doc_pages import LINK, PAGES, README, ROOT, anchors, blocks, indented, name_of, prose, section, table

import gcahng
from gcahng.cli import COMMANDS, main
from gcahng.dispatch import NAMES, ORDER

LOSS_PAGE = ROOT / "docs" / "loss.md"
COMMANDS_PAGE = ROOT / "docs" / "commands.md"
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "gcahng", "kernels", "tests")


def gcahng_commands(page: Path) -> list[list[str]]:
    """The words of every `gcahng COMMAND ...` in a page's shell blocks, fenced or indented, and inline code."""
    shown = [*blocks(page, "sh"), *blocks(page, ""), *indented(page)]
    lines = [line for block in shown for line in re.sub(r"\\\n *", "", block).splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(page))
    commands = []
    for line in lines:
        for part in re.split(r"&&|\|\|", re.sub(r"(^|\s)#.*", "", line)):
            if re.match(r"\s*(\.venv/bin/)?gcahng\s", part + " "):
                commands.append(shlex.split(part)[1:])
    return [words for words in commands if words]


def help_of(command: str, *words: str) -> str:
    """All options of a command, or of its own sub-command where the first word names one."""
    text = help_of_words(command)
    choices = re.search(r"\{([\w,]+)\}", text)
    if words and choices and words[0] in choices[1].split(","):
        return help_of_words(command, words[0])
    return text


def help_of_words(*words: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        assert main([*words, "--help-all"]) == 0
    return output.getvalue()


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[^`\s<>*]*)`", prose(page))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target in LINK.findall(prose(index))}
    assert not [name_of(page) for page in PAGES if page.is_relative_to(index.parent) and page not in {*linked, index}]


def test_every_page_is_in_the_sites_navigation() -> None:
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).as_posix() for page in PAGES if page.is_relative_to(docs)}
    named = set(re.findall(r"^ +- (?:[\w ]+: )?([\w/*]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE))
    whole = {f"{name.rpartition('/')[0]}/" for name in named if name.endswith("/*.md")}
    assert not [page for page in pages - named if not page.startswith(tuple(whole))]
    assert {name for name in named if not name.endswith("/*.md")} <= pages | {
        "index.md",
        "contributing.md",
        "changelog.md",
    }


def test_every_command_has_an_example() -> None:
    assert {words[0] for words in gcahng_commands(COMMANDS_PAGE)} == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_command_lines_exist(page: Path) -> None:
    missing = []
    for command, *words in gcahng_commands(page):
        if command.startswith("-"):
            continue
        assert command in COMMANDS, command
        text = help_of(command, *words)
        options = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--help"]
        missing += [f"{command} {o}" for o in options if not re.search(rf"(?<![\w-]){re.escape(o)}(?![\w.-])", text)]
    assert not missing


def test_training_options_take_the_values_shown() -> None:
    from gcahng.commands.train import parse

    commands = [*gcahng_commands(README), *gcahng_commands(COMMANDS_PAGE), *gcahng_commands(LOSS_PAGE)]
    shown = [words for command, *words in commands if command == "train" and "--help" not in words]
    assert len(shown) >= 8
    for words in shown:
        if "--resume" in words:  # it takes the run's options
            continue
        if "--config" in words:
            at = words.index("--config")
            words = words[:at] + words[at + 2 :]
        parse(words).check()


def test_options_and_their_defaults() -> None:
    parameters = inspect.signature(gcahng.GCAHNGLoss).parameters
    _, *rows = table(section(LOSS_PAGE, "Options that matter"))
    shown = {row[0].strip("`"): row[1].strip("`") for row in rows}
    defaults = {name: parameters[name].default for name in shown}
    assert shown == {name: f'"{value}"' if isinstance(value, str) else str(value) for name, value in defaults.items()}


def test_what_works_where() -> None:
    ops = ("loss", "edge_update", "channel_mix")
    columns = [ORDER[device] for _ in ops for device in ("cpu", "cuda")]
    heading, *rows = table(section(README, "What works where"))
    names = ["loss", *(f"`{op}`" for op in ops[1:])]
    assert heading[2:] == [f"{name}, {device}" for name in names for device in ("CPU", "CUDA")]
    assert {row[0].strip("`") for row in rows} == set(NAMES)
    for impl, _, *cells in rows:
        for implementations, cell in zip(columns, cells, strict=True):
            if cell.startswith("interpreter"):
                continue
            name = impl.strip("`")
            assert (name in implementations) == (cell not in ("–", "no")), (impl, cell)
            assert ("default" in cell) == (cell.startswith("yes") and name == implementations[0]), (impl, cell)


@pytest.mark.parametrize(("page", "name"), [(README, "glyphs"), (ROOT / "docs" / "cost.md", "engine")], ids=str)
def test_places_for_results(page: Path, name: str) -> None:
    text = page.read_text(encoding="utf-8")
    start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    assert text.count(start) == text.count(end) == 1 and text.index(start) < text.index(end)
