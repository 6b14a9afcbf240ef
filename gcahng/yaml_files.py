"""YAML files of options: read with limits, so that no file of a user's takes all memory or hangs.

A file of options has a hundred lines. A short file can stand for billions of values, though: an alias (*name) repeats
what its anchor (&name) marks, and aliases may be nested.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcahng.errors import UserError
from gcahng.files import regular_file

if TYPE_CHECKING:
    import yaml

MOST_BYTES = 2**16
MOST_VALUES = 10_000  # with what aliases repeat
MOST_LEVELS = 20
# What a shell opens for `--config <(command)` or `--config /dev/stdin`. A pipe in another place may have no writer,
# and reading it would wait for ever.
_OPEN_ALREADY = ("/dev/fd", "/proc/self/fd")


def read_yaml(path: Path | str, name: str) -> str:
    """The text of a YAML file of options, whose size, nesting and aliases are within limits.

    Args:
        path: a regular file of at most `MOST_BYTES` bytes, or what the process has open: /dev/stdin, /dev/fd/N.
        name: what messages call the file.

    Raises:
        UserError: the file is missing, no regular file, too long, not UTF-8 or not YAML; or it is nested too deep, or
            stands for more than `MOST_VALUES` values.
    """
    path = Path(path)
    try:
        if str(path) != "/dev/stdin" and str(path.parent) not in _OPEN_ALREADY:
            regular_file(path)
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be read: {reason}; it must be a YAML file of options") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"{name} has more than {MOST_BYTES:,} bytes; it must be a YAML file of options")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} has invalid UTF-8 at byte {error.start} ({error.reason}); it must be a YAML file in UTF-8"
        ) from None
    _compose(text, name)
    return text


def load_yaml(text: str, name: str) -> Any:
    """The values of a YAML text.

    Raises:
        UserError: as `read_yaml`; or a value is none.
    """
    import yaml

    loader, node = _compose(text, name)
    try:
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{name} is not YAML: {_reason(error)}") from None


def check_aliases(text: str, name: str) -> None:
    """See that a text that may be YAML does not stand for too many values. Text that is no YAML passes.

    Raises:
        UserError: it stands for more than `MOST_VALUES` values, or is nested too deep.
    """
    if any(mark in text for mark in "*[{"):
        _compose(text, name, strict=False)


def _compose(text: str, name: str, strict: bool = True) -> tuple[yaml.SafeLoader, yaml.Node | None]:
    """The nodes of a text, in which an alias is its anchor's node, and the loader that can make values of them."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Stops at the first node that is nested too deep: what follows could be as long as the text."""

        levels = 0

        def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
            if self.levels > MOST_LEVELS:
                raise RecursionError
            self.levels += 1
            node = super().compose_node(parent, index)
            self.levels -= 1
            return node

        def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
            """PyYAML takes the last of equal keys without a word, and the options of a group's first half are lost."""
            node = super().compose_mapping_node(anchor)
            lines: dict[str, int] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise UserError(f"{name} has {key.value} twice, in lines {lines[key.value]} and {line}; keep one")
                lines[key.value] = line
            return node

    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        values, levels = (0, 0) if node is None else _expanded(node, {})
    except RecursionError:
        node, values, levels = None, 0, MOST_LEVELS + 1
    except UserError:
        if strict:
            raise
        return loader, None  # type: ignore[return-value]
    except (yaml.YAMLError, ValueError) as error:
        if strict:
            raise UserError(f"{name} is not YAML: {_reason(error)}") from None
        return loader, None  # type: ignore[return-value]
    if levels > MOST_LEVELS:
        raise UserError(f"{name} is nested more than {MOST_LEVELS} levels deep; options have two")
    if values > MOST_VALUES:
        raise UserError(
            f"{name} stands for more than {MOST_VALUES:,} values, with what its aliases repeat; it must be a YAML file "
            "of options"
        )
    return loader, node  # type: ignore[return-value]


def _expanded(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node stands for, and how many levels deep it is nested.

    Each node is counted once, however often aliases repeat it; `known` holds the counts by node.
    """
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1, 0  # for a node that holds itself
        children = node.value if isinstance(node.value, list) else []
        parts = [
            _expanded(part, known) for child in children for part in (child if isinstance(child, tuple) else (child,))
        ]
        values = min(1 + sum(part[0] for part in parts), MOST_VALUES + 1)
        known[id(node)] = values, 1 + max((part[1] for part in parts), default=0)
    return known[id(node)]


def _reason(error: Exception) -> str:
    """A parser's message in one line, with the place."""
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())[:300]
