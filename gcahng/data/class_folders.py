"""Folders with one folder for each class: CLASS/image.jpg."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gcahng.data.listing import DataMismatch, Difference, NoteDifference

# The same as torchvision.datasets.folder.IMG_EXTENSIONS.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ClassFolders:
    """The contents of a folder of class folders, without hidden files and folders.

    Attributes:
        below: the folder, relative to the root of the data set; "" for the root itself.
        classes: the image file names of each class folder.
        strays: images outside of any class folder.
    """

    below: str
    classes: dict[str, list[str]]
    strays: list[str]

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
    folder = root / below
    classes, strays = {}, []
    for entry in _sorted(folder):
        if entry.is_dir():
            files = _sorted(Path(entry.path))
            classes[entry.name] = [file.name for file in files if _is_image(file.name) and not file.is_dir()]
        elif _is_image(entry.name):
            strays.append(entry.name)
    return ClassFolders(below, classes, strays)


def names_in(scanned: ClassFolders) -> list[str]:
    """All names that were listed, one per line. Equal lines mean equal files."""
    lines = [scanned.below, *scanned.strays]
    for name, files in scanned.classes.items():
        lines += [f"/{name}", *files]
    return lines


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _sorted(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        difference = Difference(f"{folder} cannot be read: {error.strerror}", "it must be a readable folder")
        raise DataMismatch(difference) from None
