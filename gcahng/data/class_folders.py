"""Folders with one folder for each class: CLASS/image.jpg."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gcahng.data.folder_entries import EXTENSIONS, NESTED, Entries, LeftOut, entries_of
from gcahng.data.listing import DataMismatch, Difference, NoteDifference


@dataclass(frozen=True)
class ClassFolders:
    """The contents of a folder of class folders, by the rule of `gcahng.data.folder_entries`.

    Attributes:
        below: the folder, relative to the root of the data set; "" for the root itself.
        classes: the image file names of each class folder.
        strays: images outside of any class folder.
        left_out: what does not count.
    """

    below: str
    classes: dict[str, list[str]]
    strays: list[str]
    left_out: LeftOut = field(default_factory=LeftOut)

    def paths(self, note: NoteDifference) -> Iterator[tuple[str, str]]:
        """Yield the class and path of every image. Note images outside of class folders and empty class folders."""
        prefix = f"{self.below}/" if self.below else ""
        for stray in self.strays:
            note(Difference(f"{prefix}{stray} is not in a class folder", f"move it to {prefix}CLASS/, or remove it"))
        for name, files in self.classes.items():
            if not files:
                kinds = ", ".join(EXTENSIONS)
                note(
                    Difference(
                        f"{prefix}{name}/ has no images ({kinds})", "remove the folder, or add the images of the class"
                    )
                )
            for file in files:
                yield name, f"{prefix}{name}/{file}"


def scan(root: Path, below: str) -> ClassFolders:
    """List the class folders of `root`/`below`, sorted by name.

    Raises:
        DataMismatch: a folder cannot be read.
    """
    left_out = LeftOut()
    prefix = f"{below}/" if below else ""
    outer = _entries(root / below, prefix, left_out)
    classes = {}
    for name in outer.folders:
        inner = _entries(root / below / name, f"{prefix}{name}/", left_out)
        classes[name] = inner.files
        for folder in inner.folders:
            left_out.add(NESTED, f"{prefix}{name}/{folder}")
    return ClassFolders(below, classes, outer.files, left_out)


def left_out_of(scanned: Iterable[ClassFolders]) -> LeftOut:
    """What does not count in any of several folders."""
    left_out = LeftOut()
    for folder in scanned:
        left_out.take(folder.left_out)
    return left_out


def names_in(scanned: ClassFolders) -> list[str]:
    """All names that were listed, one per line. Equal lines mean equal files."""
    lines = [scanned.below, *scanned.strays]
    for name, files in scanned.classes.items():
        lines += [f"/{name}", *files]
    return lines


def _entries(folder: Path, prefix: str, left_out: LeftOut) -> Entries:
    try:
        return entries_of(folder, prefix, left_out)
    except OSError as error:
        difference = Difference(f"{folder} cannot be read: {error.strerror}", "it must be a readable folder")
        raise DataMismatch(difference) from None
