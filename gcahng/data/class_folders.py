"""Folders of class folders: CLASS/image.jpg."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gcahng.data.listing import DataMismatch, Difference, ReportDifference

# As torchvision.datasets.folder.IMG_EXTENSIONS.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ClassFolders:
    """What a folder of class folders holds; hidden files and folders are left out.

    Attributes:
        below: the folder, relative to the data set's root; "" for the root itself.
        classes: the images of each class folder, by name.
        strays: images that lie in no class folder.
    """

    below: str
    classes: dict[str, list[str]]
    strays: list[str]

    def paths(self, report: ReportDifference) -> Iterator[tuple[str, str]]:
        """Class and path of every image; reports images outside of class folders, and class folders without images."""
        prefix = f"{self.below}/" if self.below else ""
        for stray in self.strays:
            report(
                Difference(f"{prefix}{stray} lies in no class folder", f"move it to {prefix}CLASS/, or out of the way")
            )
        for name, files in self.classes.items():
            if not files:
                kinds = ", ".join(EXTENSIONS)
                report(
                    Difference(f"{prefix}{name}/ has no images ({kinds})", "remove the folder, or put its images there")
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
    """Everything that was listed, as one line a name: the same lines are the same files."""
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
        difference = Difference(f"{folder} cannot be read: {error.strerror}", "it must be a folder that you may read")
        raise DataMismatch(difference) from None
