"""Files whose names are almost those that a list has: in another Unicode form, in capitals, with a space at an end."""

from __future__ import annotations

import os
import unicodedata
from pathlib import PurePath


class NearNames:
    """Looks for near matches of missing files, and reads each folder once."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, list[str]]] = {}

    def of(self, root: str | os.PathLike[str], path: str) -> str | None:
        """What there is in place of a missing file, as an error says it; None if nothing is like it.

        Args:
            root: a folder that is there.
            path: the missing file below it.
        """
        found = os.fspath(root)
        different: list[tuple[str, str]] = []
        for name in PurePath(path).parts:
            if not os.path.lexists(os.path.join(found, name)):
                near = self._names(found).get(_folded(name), [])
                if not near:
                    return None
                different.append((name, near[0]))
                name = near[0]
            found = os.path.join(found, name)
        if not different:
            return None
        name, near_name = different[0]
        return f"there is {ascii(near_name)} in place of {ascii(name)}, {_how(name, near_name)}"

    def _names(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._folders:
            names: dict[str, list[str]] = {}
            try:
                for name in sorted(os.listdir(folder)):
                    names.setdefault(_folded(name), []).append(name)
            except OSError:
                pass
            self._folders[folder] = names
        return self._folders[folder]


def near_file(path: str | os.PathLike[str]) -> str | None:
    """What there is in place of the missing `path`, see `NearNames.of`."""
    parts = PurePath(os.path.abspath(path))
    return NearNames().of(parts.anchor, str(parts.relative_to(parts.anchor)))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).strip()


def _how(name: str, near: str) -> str:
    if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", near):
        return "which is the same text in another Unicode form (composed or decomposed)"
    if name.strip() == near.strip():
        return "which has other spaces at its ends"
    if name.casefold() == near.casefold():
        return "which differs in capital and small letters"
    return "which looks almost the same"
