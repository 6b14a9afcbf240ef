"""Code on the pages: ```python blocks run, ```py blocks compile and import what exists, and names in the text exist."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from doc_pages import PAGES, README, ROOT, blocks, indented, name_of, prose, run_example

LOSS_PAGE = ROOT / "docs" / "loss.md"
OP_PAGES = [ROOT / "docs" / "edge_update.md", ROOT / "docs" / "channel_mix.md"]
OTHERS = [page for page in PAGES if blocks(page, "python") and page not in (README, LOSS_PAGE, *OP_PAGES)]
SKETCHES = [page for page in PAGES if blocks(page, "py")]
LANGUAGES = {"", "bibtex", "py", "python", "sh", "text", "toml", "yaml"}


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


@pytest.mark.parametrize("page", OTHERS, ids=name_of)
def test_blocks_of_other_pages_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page: a block may go on from the one before."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "example"}
    for number, text in enumerate(blocks(page, "python")):
        run_example(text, f"{name_of(page)}, block {number}", names)


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
    assert len(OTHERS) >= 1 and len(SKETCHES) >= 3


def wrong_imports(text: str) -> list[str]:
    """What a block imports and what does not exist."""
    wrong = []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        for name in names:
            try:
                if isinstance(node, ast.Import):
                    importlib.import_module(name)
                elif not hasattr(importlib.import_module(node.module), name):
                    importlib.import_module(f"{node.module}.{name}")
            except ImportError as error:
                wrong.append(f"{ast.unparse(node)}: {error}")
    return wrong


@pytest.mark.parametrize("page", SKETCHES, ids=name_of)
def test_sketches_compile_and_import_what_exists(page: Path) -> None:
    for number, text in enumerate(blocks(page, "py")):
        compile(text, f"{name_of(page)}, sketch {number}", "exec")
        assert not wrong_imports(text)


def test_what_does_not_exist_is_noticed() -> None:
    assert len(wrong_imports("import gcahng.nowhere\nfrom gcahng import GCAHNGLoss, Nothing\nimport torch")) == 2


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_is_fenced_and_named(page: Path) -> None:
    """Code in a block that is indented, or of a language that no test knows, would never be tried."""
    fences = re.findall(r"^[ ]*```+ *(\S*)\n.*?^[ ]*```+$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert set(fences) <= LANGUAGES
    assert len(fences) == sum(len(blocks(page, language)) for language in LANGUAGES)
    statement = re.compile(r"^ {4}(import \w|from [\w.]+ import |>>> |\w+ = gcahng\.)", re.MULTILINE)
    assert not [block for block in [*indented(page), *blocks(page, "")] if statement.search("    " + block.lstrip())]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)  # history
def test_names_in_the_text_exist(page: Path) -> None:
    missing = []
    for name in sorted(set(re.findall(r"`(gcahng(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`", prose(page)))):
        if name.endswith(".json"):
            continue
        value, path = importlib.import_module("gcahng"), "gcahng"
        for part in name.split(".")[1:]:
            path = f"{path}.{part}"
            if not hasattr(value, part):
                try:
                    importlib.import_module(path)
                except ImportError:
                    missing.append(name)
                    break
            value = getattr(value, part)
    assert not missing
