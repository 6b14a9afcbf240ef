"""Imports between the rooms of the package point one way, and private names stay where they are."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import gcahng

ROOT = Path(gcahng.__file__).parent

# From the bottom up. A room is a folder of gcahng/ or a module beside them; it imports from its own layer and from
# those above it in this list. "gcahng" is the package itself: its version and its loss.
LAYERS = [
    ["errors", "machine", "installed"],
    ["bounds", "launch"],
    ["extras", "progress", "paths", "files", "streams", "yaml_files", "devices", "native"],
    ["reference"],
    ["kernels"],
    ["engine"],
    ["availability"],
    ["dispatch"],
    ["ops"],
    ["nn"],
    ["losses"],
    ["gcahng"],
    ["testing"],
    ["processes"],
    ["data"],
    ["retrieval"],
    ["integrations"],
    ["config"],
    ["recipes"],
    ["runs"],
    ["models"],
    ["evaluation"],
    ["train"],
    ["report"],
    ["study"],
    ["env", "bench"],
    ["commands"],
    ["cli"],
    ["__main__"],
]

# Rooms whose annotations (`if TYPE_CHECKING:`) may name what lies above them: a kernel's launcher takes the NamedTuples
# of its stage, and the reference and the engine take the modules that own the parameters.
TYPES_FROM_ABOVE = {"reference", "kernels", "engine"}


class Import(NamedTuple):
    """One imported thing.

    Attributes:
        where: the file and the line.
        importer: the dotted module that imports.
        module: the dotted module that is imported, or imported from.
        name: what is imported from it; None: the module itself.
        typing: whether it is under `if TYPE_CHECKING:`, and so no import at run time.
    """

    where: str
    importer: str
    module: str
    name: str | None
    typing: bool = False

    @property
    def counts(self) -> bool:
        """Whether the order of rooms holds for it."""
        return not (self.typing and room(self.importer) in TYPES_FROM_ABOVE)


def modules(root: Path) -> dict[str, Path]:
    """The dotted names of a package's modules; a package is named like its folder."""
    dotted = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        dotted[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    # glob does not follow the link to kernels/ in a checkout.
    for path in sorted((root / "kernels").glob("*.py")):
        name = f"{root.name}.kernels" if path.stem == "__init__" else f"{root.name}.kernels.{path.stem}"
        dotted[name] = path
    return dotted


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@functools.cache
def imports(root: Path) -> list[Import]:
    """Every import of one of the package's modules by another, in functions and under TYPE_CHECKING too."""
    return list(_imports(root))


def _imports(root: Path) -> Iterator[Import]:
    known = modules(root)
    for importer, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typed = {child for node in ast.walk(tree) if is_type_checking(node) for child in ast.walk(node)}
        for node in ast.walk(tree):
            where = f"{path.relative_to(root.parent)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in known:
                        yield Import(where, importer, alias.name, None, node in typed)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{where}: a relative import; it must be absolute"
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    if submodule in known:
                        yield Import(where, importer, submodule, None, node in typed)
                    elif node.module in known:
                        yield Import(where, importer, node.module, alias.name, node in typed)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def against_the_order(root: Path, layers: list[list[str]]) -> list[str]:
    """The imports that point up."""
    height = {name: i for i, names in enumerate(layers) for name in names}
    return [
        f"{i.where}: {room(i.importer)} imports {i.module}"
        for i in imports(root)
        if i.counts and height[room(i.importer)] < height[room(i.module)]
    ]


def circle(root: Path) -> list[str]:
    """Modules that import each other in turn; empty if there are none."""
    edges: dict[str, set[str]] = {name: set() for name in modules(root)}
    for i in imports(root):
        if i.counts:
            edges[i.importer].add(i.module)
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            path.append(module)
            for other in sorted(edges[module]):
                if cycle := visit(other):
                    return cycle
            path.pop()
            done.add(module)
        return []

    return next((cycle for module in edges if (cycle := visit(module))), [])


def private(root: Path) -> list[str]:
    """Imports of underscore names, and of underscore modules from outside the package that they lie in."""
    borrowed = []
    for i in imports(root):
        package = i.module.rpartition(".")[0]
        own = i.importer == package or i.importer.rpartition(".")[0] == package
        if i.name is not None and i.name.startswith("_") and not i.name.startswith("__"):
            borrowed.append(f"{i.where}: {i.module}.{i.name}")
        elif i.module.rpartition(".")[2].startswith("_") and not own:
            borrowed.append(f"{i.where}: {i.module}")
    return borrowed


def test_every_room_has_a_layer() -> None:
    rooms = {room(module) for module in modules(ROOT)}
    assert rooms == {name for names in LAYERS for name in names}


def test_imports_point_down() -> None:
    assert against_the_order(ROOT, LAYERS) == []


def test_no_circle() -> None:
    assert circle(ROOT) == []


def test_no_private_names() -> None:
    assert private(ROOT) == []


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "gcahng" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "gcahng"


@pytest.mark.parametrize("code", ["{}", "def f():\n    {}", "if TYPE_CHECKING:\n    {}"])
@pytest.mark.parametrize("statement", ["from gcahng.b.m import x", "from gcahng.b import m", "import gcahng.b.m"])
def test_an_import_that_points_up_is_seen(tmp_path: Path, code: str, statement: str) -> None:
    files = {
        "__init__.py": "",
        "a/__init__.py": "",
        "a/m.py": code.format(statement),
        "b/__init__.py": "",
        "b/m.py": "",
    }
    root = make(tmp_path, files)
    assert len(against_the_order(root, [["gcahng"], ["a"], ["b"]])) == 1
    assert against_the_order(root, [["gcahng"], ["b"], ["a"]]) == [] and circle(root) == []


def test_a_circle_and_private_names_are_seen(tmp_path: Path) -> None:
    root = make(
        tmp_path,
        {
            "__init__.py": "",
            "a.py": "import gcahng.b",
            "b.py": "def f():\n    from gcahng.c import g",
            "c.py": "from gcahng import a\nfrom gcahng.d import _x\nfrom gcahng.e import _y",
            "d.py": "",
            "e/__init__.py": "from gcahng.e import _y",
            "e/_y.py": "",
        },
    )
    assert circle(root) == ["gcahng.a", "gcahng.b", "gcahng.c", "gcahng.a"]
    assert [line.split(": ")[1] for line in private(root)] == ["gcahng.d._x", "gcahng.e._y"]
