"""The images that the label files of a data set list, compared with the files that are there."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from gcahng.data.folder_entries import LeftOut
from gcahng.data.near_names import NearNames
from gcahng.errors import UserError
from gcahng.files import regular_file
from gcahng.paths import shown_path

SPLITS = ("train", "val", "test", "gallery")


class Entry(NamedTuple):
    """An image that a label file lists.

    Attributes:
        split: one of `SPLITS`; a query has the split "test".
        path: path relative to the data set's folder, with forward slashes.
        label: label of the class; classes are numbered in the order of their labels.
        class_name: name of the class.
        where: the file and line that list the image.
    """

    split: str
    path: str
    label: int | str
    class_name: str
    where: str


@dataclass(frozen=True)
class Difference:
    """A difference between the files and the published data set, and its remedy."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


class DataMismatch(UserError):
    """The files differ from the published data set; `difference` says how."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(str(difference))
        self.difference = difference


NoteDifference = Callable[[Difference], None]


def raise_difference(difference: Difference) -> None:
    """A `NoteDifference` that stops at the first difference.

    Raises:
        DataMismatch: always, with `difference`.
    """
    raise DataMismatch(difference)


@dataclass(frozen=True)
class DataSetFiles:
    """The files of a data set before they are read.

    Attributes:
        root: the folder that paths are relative to.
        key: a hash that changes with the label files. For class folders it changes when a file is added, removed or
            renamed.
        entries: yields the images and notes what it cannot understand.
        left_out: what does not count among the files and folders that were found.
    """

    root: Path
    key: str
    entries: Callable[[NoteDifference], Iterable[Entry]]
    left_out: LeftOut = field(default_factory=LeftOut)


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split.

    Attributes:
        paths: N paths below the root of the data set.
        labels: N labels in 0 … classes - 1.
        class_names: the name of each label.
        sizes: N sizes in bytes.
    """

    paths: list[str]
    labels: list[int]
    class_names: list[str]
    sizes: list[int]


@dataclass(frozen=True)
class Listing:
    """All files of a data set. `splits` holds those of `SPLITS` that are not empty."""

    root: Path
    splits: dict[str, SplitFiles]


def collect(data_files: DataSetFiles, note: NoteDifference) -> Listing:
    """Read the label files and look at every file that they list.

    Args:
        data_files: the label files.
        note: called with each path that leaves the folder, file that is listed twice (also by a link, where its class
            or split is another one), missing file, class in two splits, and split without images. If it returns, the
            listing goes on without the file in question.

    Raises:
        DataMismatch: a label file cannot be read at all.
    """
    folder = _Folder(data_files.root)
    first_listed: dict[str, str] = {}
    missing: list[Entry] = []
    present: list[tuple[Entry, int]] = []
    listed = Counter[str]()
    for entry in data_files.entries(note):
        if entry.path in first_listed:
            note(
                Difference(
                    f"{entry.where}: {shown_path(entry.path)} is listed twice, first in {first_listed[entry.path]}",
                    "an image belongs to one class and one split: keep one of the lines",
                )
            )
            continue
        first_listed[entry.path] = entry.where
        listed[_parent(entry.path)] += 1
        problem, size = folder.look_at(entry)
        if problem is not None:
            note(problem)
        elif size is None:
            missing.append(entry)
        else:
            present.append((entry, size))
    _note_missing(data_files.root, missing, listed, note)
    present = _without_linked_twice(folder.linked, present, note)
    _note_shared_classes([entry for entry, _ in present], note)
    splits = _number_classes(present)
    for split in ("train", "test"):
        if split not in splits:
            note(Difference(f"{data_files.root} has no {split} images", "it must have some"))
    return Listing(data_files.root, splits)


def lines_of(path: Path, note: NoteDifference) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line that is not blank. Note lines that are not UTF-8.

    Raises:
        DataMismatch: the file cannot be read.
    """
    for number, line in enumerate(split_lines(read_bytes(path)), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(" \t")
        except UnicodeDecodeError:
            note(bad_line(path, number, repr(line)[1:], "UTF-8 text"))
            continue
        if text:
            yield number, text


def split_lines(content: bytes) -> list[bytes]:
    """The lines of a text. They end in \\n, \\r\\n or \\r; Unicode's other line ends may be in a file's name."""
    return content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")


def bad_line(path: Path, number: int, line: str, expected: str) -> Difference:
    """The `Difference` of a line that should be `expected`."""
    return Difference(f"{path.name} line {number} is {line!r}", f"it must be {expected}: restore the original {path}")


def read_bytes(path: Path) -> bytes:
    """The content of a label file.

    Raises:
        DataMismatch: it cannot be read.
    """
    try:
        return regular_file(path).read_bytes()
    except OSError as error:
        difference = Difference(f"{path} cannot be read: {error.strerror}", "it must be a readable file")
        raise DataMismatch(difference) from None


def locate(root: Path, marker: str, *below: str) -> Path | None:
    """The first of `root` and its folders `below` that contains the file or folder `marker`."""
    return next((base for base in (root, *(root / name for name in below)) if (base / marker).exists()), None)


class _Folder:
    """Looks up the files below a folder, and checks that their paths stay within it.

    Attributes:
        linked: the real path below the folder of each listed file that a link leads to.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._real_root = root, os.path.realpath(root)
        self._below: dict[str, str | None] = {}
        self.linked: dict[str, str] = {}

    def look_at(self, entry: Entry) -> tuple[Difference | None, int | None]:
        """What is wrong with the path of an entry (None: nothing), and the size of its file (None: it is missing)."""
        if leaves_folder(entry.path):
            return self._outside(entry, "leaves the data set's folder"), None
        path = os.path.join(self._root, entry.path)
        parent, name = os.path.split(path)
        if parent not in self._below:
            self._below[parent] = self._real_below(parent)
        folder = self._below[parent]
        if folder is None:
            return self._outside(entry, "leads out of the data set's folder through a symbolic link"), None
        real: str | None = f"{folder}/{name}" if folder != "." else name
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                real = self._real_below(path)
                if real is None:
                    return self._outside(entry, "is a symbolic link that leads out of the data set's folder"), None
                status = os.stat(path)
        except (OSError, ValueError):  # ValueError: a NUL in the name
            return None, None
        if real is not None and real != entry.path:
            self.linked[entry.path] = real
        return None, status.st_size if stat.S_ISREG(status.st_mode) else None

    def _real_below(self, path: str) -> str | None:
        """Where a path leads, relative to the folder; None: out of it."""
        try:
            real = os.path.realpath(path)
        except ValueError:  # a NUL in the name
            return "."
        if not Path(real).is_relative_to(self._real_root):
            return None
        return os.path.relpath(real, self._real_root).replace(os.sep, "/")

    def _outside(self, entry: Entry, how: str) -> Difference:
        remedy = f"every image must be inside {self._root}: correct the path, or move or copy the file there"
        return Difference(f"{entry.where}: {entry.path!r} {how}", remedy)


def leaves_folder(path: str) -> bool:
    """Whether a listed path is absolute or contains `..`, by the rules of any operating system."""
    if path.startswith(("/", "\\")) or (":" in path and PureWindowsPath(path).drive):
        return True
    return ".." in path and ".." in re.split(r"[\\/]", path)


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "."


def _without_linked_twice(
    linked: dict[str, str], present: list[tuple[Entry, int]], note: NoteDifference
) -> list[tuple[Entry, int]]:
    """Note and leave out links to a file that is listed in another class or another split."""
    if not linked:
        return present
    first_of: dict[str, Entry] = {}
    for entry, _ in sorted(present, key=lambda found: found[0].path in linked):  # files before links to them
        first_of.setdefault(linked.get(entry.path, entry.path), entry)
    kept = []
    for entry, size in present:
        first = first_of[linked.get(entry.path, entry.path)]
        if (entry.split, entry.label) == (first.split, first.label):
            kept.append((entry, size))
            continue
        note(
            Difference(
                f"{entry.where}: {shown_path(entry.path)} is the same file as {shown_path(first.path)} "
                f"(listed in {first.where})",
                "an image belongs to one class and one split: keep one of the two names",
            )
        )
    return kept


def _note_missing(root: Path, missing: list[Entry], listed: Counter[str], note: NoteDifference) -> None:
    """Note each missing file, or once a folder whose files are all missing, with what is there in its place."""
    names = NearNames()

    def instead(path: str) -> str:
        near = names.of(root, path) if "\0" not in path else None
        return "" if near is None else f"; {near}"

    missing_in = Counter(_parent(entry.path) for entry in missing)
    remedy = "unpack the original archive again, or correct the list"
    noted: set[str] = set()
    for entry in missing:
        parent = _parent(entry.path)
        if missing_in[parent] == listed[parent] > 1:
            if parent not in noted:
                noted.add(parent)
                note(
                    Difference(
                        f"{shown_path(parent)}/: all {missing_in[parent]:,} files listed there are missing, "
                        f"the first in {entry.where}{instead(entry.path)}",
                        remedy,
                    )
                )
        else:
            what = f"{shown_path(entry.path)} is missing (listed in {entry.where}){instead(entry.path)}"
            note(Difference(what, remedy))


def _note_shared_classes(entries: list[Entry], note: NoteDifference) -> None:
    """Note classes that are in two splits, as in an image-level split."""
    sides: dict[str, dict[int | str, Entry]] = {}
    for entry in entries:
        side = "test" if entry.split == "gallery" else entry.split
        sides.setdefault(side, {}).setdefault(entry.label, entry)
    for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
        shared = [label for label in sides.get(one, {}) if label in sides.get(other, {})]
        if shared:
            first, second = sides[one][shared[0]], sides[other][shared[0]]
            note(
                Difference(
                    f"{len(shared):,} of {len(sides[one]):,} {one} classes are {other} classes too, such as "
                    f"{first.class_name} ({first.where} and {second.where})",
                    "this is an image-level split, as in classification. Retrieval is tested on classes that were not "
                    f"trained on: put all images of a class into {one}, or all into {other}",
                )
            )


def _number_classes(present: list[tuple[Entry, int]]) -> dict[str, SplitFiles]:
    """The files of each split, with labels 0 … in the order of the entries' labels. Test and gallery share labels."""
    splits: dict[str, SplitFiles] = {}
    for group in (("train",), ("val",), ("test", "gallery")):
        names: dict[int | str, str] = {}
        for entry, _ in present:
            if entry.split in group:
                names.setdefault(entry.label, entry.class_name)
        ranks = {label: rank for rank, label in enumerate(sorted(names))}  # type: ignore[type-var]
        for split in group:
            own = [(entry, size) for entry, size in present if entry.split == split]
            if own:
                splits[split] = SplitFiles(
                    paths=[entry.path for entry, _ in own],
                    labels=[ranks[entry.label] for entry, _ in own],
                    class_names=[names[label] for label in ranks],
                    sizes=[size for _, size in own],
                )
    return splits
