"""Which modules and names the API pages of the site show: read from the source, without importing it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

# What the documentation calls public, in the order of the site. A package shows its __all__; a module without one
# shows what it defines.
PUBLIC = (
    "gcahng",
    "gcahng.losses",
    "gcahng.ops",
    "gcahng.nn",
    "gcahng.integrations",
    "gcahng.data",
    "gcahng.retrieval",
    "gcahng.retrieval.embeddings",
    "gcahng.retrieval.index_file",
    "gcahng.recipes",
    "gcahng.train",
    "gcahng.evaluation.embed",
    "gcahng.models.export",
    "gcahng.report",
    "gcahng.testing",
)


def modules(root: Path) -> list[str]:
    """The dotted names of all modules with a page. `gcahng.integrations` stands for each module in it."""
    found = []
    for name in PUBLIC:
        folder = root / name.replace(".", "/")
        inner = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
        found += [f"{name}.{stem}" for stem in inner] if name == "gcahng.integrations" else [name]
    return found


def place(module: str) -> str:
    """Where the page of a module is in the site's sources."""
    return f"api/{module}.md"


@cache
def tree(root: Path, module: str) -> ast.Module | None:
    """The syntax tree of a module; None if there is no such module."""
    base = root / module.replace(".", "/")
    for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
        if path.exists():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def public_names(root: Path, module: str) -> list[str]:
    """The names that a module offers: its __all__, or the functions and classes that it defines."""
    body = tree(root, module).body
    for node in body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
            return sorted((name for name in names if not name.startswith("_")), key=str.lower)
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def origin(root: Path, module: str, name: str) -> str:
    """The dotted name under which something is defined, which may be in another module than the one that offers it."""
    for node in ast.walk(tree(root, module)):  # imports for annotations lie deeper
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gcahng"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return origin(root, node.module, alias.name)
    return f"{module}.{name}"


def page(root: Path, module: str, documented: set[str]) -> str:
    """The Markdown of a module's page.

    Args:
        root: the repository.
        module: its dotted name.
        documented: origins of what earlier pages show; this page's are added. Those are linked to, not shown again.
    """
    summary = ast.get_docstring(tree(root, module)) or ""
    lines = [f"# {module}", "", summary.replace("\n    ", "\n"), ""]
    for name in public_names(root, module):
        where = origin(root, module, name)
        if where in documented:
            lines += [f"`{module}.{name}` is [`{where.rpartition('.')[2]}`][{where}].", ""]
        else:
            documented.add(where)
            lines += [f"::: {module}.{name}", ""]
    return "\n".join(lines)
