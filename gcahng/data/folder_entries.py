"""Which files and folders in a folder count: one rule for class folders and for folders that are embedded.

- Hidden names (that begin with a dot), and those that systems make for themselves, are left out.
- Links are followed. One that leads to a folder around it, a loop, is left out.
- A file counts if its name ends as an image's does; also if it cannot be read, which whoever reads it says.
- A folder that cannot be read is an error of whoever lists it.

What is left out and might have been meant is collected, so that it can be said once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gcahng.paths import shown_path

# The same as torchvision.datasets.folder.IMG_EXTENSIONS.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Thumbnails, snapshots and trash of network storage, of archives made on a Mac, and of Windows and Linux.
_SYSTEM_NAMES = frozenset(
    (
        "@eadir", "@__thumb", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "$recycle.bin",
        "system volume information", "lost+found",
    )
)  # fmt: skip
# Formats of images that are not read.
_OTHER_FORMATS = (
    ".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".jfif", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw",
)  # fmt: skip


class Reason(NamedTuple):
    """Why something was left out.

    Attributes:
        one: what one such thing is called.
        many: what several are called.
    """

    one: str
    many: str


HIDDEN = Reason("hidden", "hidden")
LOOP = Reason("loop of links", "loops of links")
NOWHERE = Reason("link that leads nowhere", "links that lead nowhere")
SPECIAL = Reason("that is neither a file nor a folder", "that are neither files nor folders")
OTHER_FORMAT = Reason("of another image format", "of other image formats")
NESTED = Reason("folder inside a class folder", "folders inside class folders")
LISTED_ALREADY = Reason("link to a folder that is listed anyway", "links to folders that are listed anyway")
UNREADABLE = Reason("folder that cannot be read", "folders that cannot be read")

_NAMED = 3


@dataclass
class LeftOut:
    """What was left out of folders.

    Attributes:
        paths: by the reason, which is one of the constants of this module.
    """

    paths: dict[Reason, list[str]] = field(default_factory=dict)

    def add(self, reason: Reason, path: str) -> None:
        """Note that `path` was left out for `reason`."""
        self.paths.setdefault(reason, []).append(path)

    def take(self, other: LeftOut) -> None:
        """Add what `other` has."""
        for reason, paths in other.paths.items():
            self.paths.setdefault(reason, []).extend(paths)

    def __bool__(self) -> bool:
        return bool(self.paths)

    def __str__(self) -> str:
        """One line: how many for which reason, with the first few names."""
        parts = []
        for reason, paths in sorted(self.paths.items()):
            more = ", …" if len(paths) > _NAMED else ""
            what = reason.one if len(paths) == 1 else reason.many
            parts.append(f"{len(paths):,} {what} ({', '.join(map(shown_path, paths[:_NAMED]))}{more})")
        return "; ".join(parts)


class Entries(NamedTuple):
    """What counts in a folder, sorted by name.

    Attributes:
        files: images.
        folders: folders, also those that a link leads to.
        linked: those of `folders` that are links.
    """

    files: list[str]
    folders: list[str]
    linked: set[str]


def entries_of(folder: Path, below: str, left_out: LeftOut, extensions: Sequence[str] = EXTENSIONS) -> Entries:
    """List a folder by the rule of this module.

    Args:
        folder: the folder.
        below: what stands before the names of its entries where they are left out: "" or a path that ends in "/".
        left_out: is added to.
        extensions: of images, in small letters.

    Raises:
        OSError: the folder cannot be read.
    """
    files, folders, linked = [], [], set()
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        name, path = entry.name, below + entry.name
        is_image = name.lower().endswith(tuple(extensions))
        is_folder, is_file = _kind(entry)
        if name.startswith(".") or name.lower() in _SYSTEM_NAMES:
            if is_folder or is_image:
                left_out.add(HIDDEN, path)
        elif is_folder:
            if entry.is_symlink() and _is_around(entry.path, folder):
                left_out.add(LOOP, path)
                continue
            folders.append(name)
            if entry.is_symlink():
                linked.add(name)
        elif is_image and (is_file or entry.is_symlink()):  # whoever reads a dangling link names it
            files.append(name)
        elif is_image:
            left_out.add(SPECIAL, path)
        elif entry.is_symlink() and not is_file:
            left_out.add(NOWHERE, path)
        elif name.lower().endswith(_OTHER_FORMATS):
            left_out.add(OTHER_FORMAT, path)
    return Entries(files, folders, linked)


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether an entry is a folder and whether it is a file, or leads to one."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError:  # links that lead to each other
        return False, False


def _is_around(path: str, folder: Path) -> bool:
    """Whether `path` leads to `folder` or to a folder that it is in."""
    outer, inner = os.path.realpath(path), os.path.realpath(folder)
    return inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)
