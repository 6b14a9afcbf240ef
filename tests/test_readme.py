"""README and docs say what is so: examples run, links lead somewhere, options and files exist."""

import contextlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gcahng
from gcahng.cli import COMMANDS, main
from gcahng.dispatch import NAMES, ORDER

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
LOSS_PAGE = ROOT / "docs" / "loss.md"
COMMANDS_PAGE = ROOT / "docs" / "commands.md"
OP_PAGES = [ROOT / "docs" / "edge_update.md", ROOT / "docs" / "channel_mix.md"]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "gcahng", "kernels", "tests")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks and comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The headings' anchors, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def section(page: Path, title: str) -> str:
    """The text of a page's section, without its heading."""
    found = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert found, title
    return found[1]


def table(text: str) -> list[list[str]]:
    """The cells of a section's first table, heading first."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return [cells[0], *cells[2:]]


def gcahng_commands(page: Path) -> list[list[str]]:
    """The words of every `gcahng COMMAND ...` in a page's shell blocks, fenced or indented, and inline code."""
    shown = [*blocks(page, "sh"), *blocks(page, ""), *re.findall(r"(?:^ {4}.*\n)+", prose(page), re.MULTILINE)]
    lines = [line for block in shown for line in re.sub(r"\\\n *", "", block).splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(page))
    commands = []
    for line in lines:
        for part in re.split(r"&&|\|\|", re.sub(r"(^|\s)#.*", "", line)):
            if re.match(r"\s*(\.venv/bin/)?gcahng\s", part + " "):
                commands.append(shlex.split(part)[1:])
    return [words for words in commands if words]


def help_of(command: str, *words: str) -> str:
    """The help of a command, or of its own sub-command where the first word names one."""
    text = help_of_words(command)
    choices = re.search(r"\{([\w,]+)\}", text)
    if words and choices and words[0] in choices[1].split(","):
        return help_of_words(command, words[0])
    return text


def help_of_words(*words: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        assert main([*words, "--help"]) == 0
    return output.getvalue()


def run_example(text: str, name: str, names: dict) -> None:
    """Execute a block of Python with these names, which it may add to."""
    with torch.random.fork_rng():
        exec(compile(text, name, "exec"), names)


def check_logs(names: dict) -> None:
    assert {name: bool(value.isfinite()) for name, value in names["logs"].items()} == dict.fromkeys(
        ("J_m", "J_syn", "J_gce", "J_cls", "J_soft", "J_sim", "J_div", "J_gen"), True
    )


def test_the_readmes_loop_runs_before_and_after() -> None:
    before, after = blocks(README, "python")
    names: dict = {"__name__": "example"}
    run_example(before, "README, before", names)
    assert "logs" not in names and names["loss"].isfinite()
    run_example(after, "README, after", names)
    check_logs(names)
    assert len(before.splitlines()) + len(after.splitlines()) <= 25


@pytest.mark.parametrize("number", range(len(blocks(LOSS_PAGE, "python"))))
def test_examples_run(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "example"}
    run_example(blocks(LOSS_PAGE, "python")[number], f"docs/loss.md, example {number}", names)
    check_logs(names)
    assert re.search(r"\d\.\d{3}$", capsys.readouterr().out)


@pytest.mark.parametrize("page", OP_PAGES, ids=name_of)
def test_examples_of_ops_run(page: Path, capsys: pytest.CaptureFixture) -> None:
    (text,) = blocks(page, "python")
    run_example(text, name_of(page), {"__name__": "example"})
    assert re.search(r"^\([\d, ]+\), gradient of the \w+ \d+\.\d+$", capsys.readouterr().out)
    assert len([line for line in text.splitlines() if line]) <= 10


@pytest.mark.processes
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
def test_the_example_for_several_processes_runs(tmp_path: Path) -> None:
    (text,) = blocks(LOSS_PAGE, "py")
    script = tmp_path / "shared.py"
    script.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"J_m \d\.\d{3}, J_gen \d+\.\d{3}\n", done.stdout), done.stdout


def test_there_are_examples() -> None:
    assert len(blocks(LOSS_PAGE, "python")) == 2


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_picture_is_what_its_script_draws() -> None:
    script = ROOT / "docs" / "images" / "make_overview.py"
    spec = importlib.util.spec_from_file_location("make_overview", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PICTURE.read_text(encoding="utf-8") == module.picture(), "run python docs/images/make_overview.py"


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
