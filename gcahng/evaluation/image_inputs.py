"""The images that a user names: a split of a data set, folders, lists of paths, single files."""

from __future__ import annotations

import codecs
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch

from gcahng.data import DataSplits, ImageFiles, LabeledImages, load_data
from gcahng.data.config import DataConfig, DataName
from gcahng.data.folder_entries import EXTENSIONS, LISTED_ALREADY, UNREADABLE, LeftOut, entries_of
from gcahng.data.listing import split_lines
from gcahng.data.near_names import near_file
from gcahng.data.sampler import UNLABELED
from gcahng.errors import UserError, UserNote
from gcahng.files import regular_file
from gcahng.paths import shown_path
from gcahng.retrieval.items import Items, Source

SPLITS = ("test", "train", "val", "gallery")
IMAGE_SUFFIXES = tuple(sorted((*EXTENSIONS, ".gif")))
LIST_SUFFIXES = (".lst", ".txt")


def with_data(config: DataConfig, options: dict[str, Any]) -> DataConfig:
    """A config with some fields replaced.

    Args:
        config: of the training run.
        options: fields by name. Another data set does not take over the run's files and its split.

    Raises:
        UserError: there is no such data set or option, or images are smaller than what is cut out of them.
    """
    name = options.get("name", config.name)
    if name != config.name:
        defaults = DataConfig()
        config = replace(
            config,
            root=None,
            csv=None,
            val_classes=None,
            train_classes=defaults.train_classes,
            merge_lookalikes=defaults.merge_lookalikes,
            exif_rotate=None,
        )
    known = {field.name for field in fields(DataConfig)}
    unknown = set(options) - known
    if unknown:
        raise UserError(f"data.{min(unknown)} is not an option; it must be one of {', '.join(sorted(known))}")
    if name not in get_args(DataName):
        raise UserError(f"data.name is {name!r}; it must be one of {', '.join(get_args(DataName))}")
    config = replace(config, **options)
    config.check()
    return config


def rotates_files(config: DataConfig, asked: bool | None = None) -> bool:
    """Whether image files that a user names are rotated as their EXIF orientation says.

    They are a user's own, as those of `folder` are, so the option of a run on one of the published sets says nothing
    about them.

    Args:
        config: of the training run.
        asked: what the user says; None: nothing.
    """
    if asked is not None:
        return asked
    return config.rotates if config.name in ("folder", "csv") else True


def choose_split(data: DataSplits, split: str, name: str) -> LabeledImages:
    """One of the splits of a data set.

    Args:
        data: the splits.
        split: test, train, val or gallery.
        name: of the data set, for the error.

    Raises:
        UserError: the data set has no such split.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    images = getattr(data, split)
    if images is None:
        there = [other for other in SPLITS if getattr(data, other) is not None]
        raise UserError(f"split is {split}; of {name} it must be one of {', '.join(there)}")
    return images


def dataset_images(config: DataConfig, split: str) -> tuple[LabeledImages, Items]:
    """The images of a split of a data set, and what they are.

    Args:
        config: the options of the data set.
        split: test, train, val or gallery.

    Raises:
        UserError: the data set has no such split, or cannot be read.
    """
    images = choose_split(load_data(config), split, config.name)
    names = tuple(images.name(i) for i in range(len(images)))
    root = str(images.root.absolute()) if isinstance(images, ImageFiles) else None
    source = Source(len(images), root, asdict(config), split)
    return images, Items(names, images.labels.cpu(), images.class_names, (source,))


def files_images(
    paths: Sequence[Path],
    *,
    labels_from_folders: bool = False,
    exif_rotate: bool = True,
    skip_unreadable: bool = False,
) -> tuple[ImageFiles, Items]:
    """The images that image files, folders (with all folders in them) and lists of paths name.

    What counts in a folder says `gcahng.data.folder_entries`. A list is a .txt or .lst file with one path in each line,
    relative to the list's folder. The root of the images is the folder itself where one folder is given, otherwise the
    folder that all images have in common. A `UserNote` names what was left out of folders, and images that are named
    more than once.

    Args:
        paths: what is named. The images come in this order; those of a folder are sorted by their path.
        labels_from_folders: whether the name of an image's folder is its class; otherwise images have no class.
        exif_rotate: whether the images are to be rotated as their EXIF orientation says.
        skip_unreadable: whether folders that cannot be read are left out, and lists may have files that are missing,
            which are then left out when images are read.

    Returns:
        The images, and what they are.

    Raises:
        UserError: a path does not exist or is no image, or a folder or a list has no images or cannot be read.
    """
    if not paths:
        raise UserError("no images are given; name image files, folders or lists of paths")
    left_out = LeftOut()
    files = [file for path in paths for file in _files_of(Path(path), left_out, skip_unreadable)]
    if left_out:
        warnings.warn(f"left out: {left_out}", UserNote, stacklevel=2)
    _note_repeated(files)
    root = (
        paths[0] if len(paths) == 1 and os.path.isdir(paths[0]) else Path(os.path.commonpath([f.parent for f in files]))
    )
    root = Path(os.path.abspath(root))
    names = tuple(os.path.relpath(file, root).replace(os.sep, "/") for file in files)
    class_names: tuple[str, ...] = ()
    labels = torch.full((len(files),), UNLABELED)
    if labels_from_folders:
        folders = [file.parent.name for file in files]
        class_names = tuple(sorted(set(folders)))
        places = {name: i for i, name in enumerate(class_names)}
        labels = torch.tensor([places[folder] for folder in folders])
    images = ImageFiles(root, names, labels, class_names, exif_rotate)
    return images, Items(names, labels, class_names, (Source(len(files), str(root)),))


def _files_of(path: Path, left_out: LeftOut, skip_unreadable: bool) -> list[Path]:
    """The absolute image files that `path` means."""
    if os.path.isdir(path):  # unlike Path.is_dir, it takes names that are too long for the system
        files = _files_below(path, left_out, skip_unreadable)
        if not files:
            but = f"; left out: {left_out}" if left_out else ""
            raise UserError(f"{path} holds no images; it must hold files that end in {', '.join(IMAGE_SUFFIXES)}{but}")
        return files
    if not os.path.exists(path):
        raise UserError(f"{_missing(path)}; name an image, a folder or a list of paths")
    suffix = path.suffix.lower()
    if suffix not in (*IMAGE_SUFFIXES, *LIST_SUFFIXES):
        raise UserError(
            f"{path} is neither an image ({', '.join(IMAGE_SUFFIXES)}) nor a list of paths ({', '.join(LIST_SUFFIXES)})"
        )
    try:
        regular_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; it must be an image or a list of paths") from None
    return _listed(path, skip_unreadable) if suffix in LIST_SUFFIXES else [Path(os.path.abspath(path))]


def _files_below(root: Path, left_out: LeftOut, skip_unreadable: bool) -> list[Path]:
    """The images in a folder and in all folders in it, sorted. A folder that links lead to is listed once."""
    start = os.path.abspath(root)
    files: list[Path] = []
    listed: set[str] = set()
    links: list[str] = []
    folders = [start]
    while folders or links:
        # Links come last, so that a folder is listed by its own name if it has one here.
        folder = folders.pop() if folders else links.pop(0)
        if (real := os.path.realpath(folder)) in listed:
            left_out.add(LISTED_ALREADY, os.path.relpath(folder, start))
            continue
        listed.add(real)
        below = "" if folder == start else os.path.relpath(folder, start) + os.sep
        try:
            found = entries_of(Path(folder), below, left_out, IMAGE_SUFFIXES)
        except OSError as error:
            if not skip_unreadable or folder == start:
                raise UserError(
                    f"{folder} cannot be read: {error.strerror}; it must be a readable folder, or be left out with "
                    "--skip_unreadable"
                ) from None
            left_out.add(UNREADABLE, below.rstrip(os.sep))
            continue
        files += [Path(folder, name) for name in found.files]
        for name in found.folders:
            (links if name in found.linked else folders).append(os.path.join(folder, name))
    return sorted(files)


def _listed(path: Path, skip_unreadable: bool) -> list[Path]:
    """The absolute files that a list names."""
    try:
        content = regular_file(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is text in UTF-16; it must be UTF-8")
    files = []
    for number, line in enumerate(split_lines(content.removeprefix(codecs.BOM_UTF8)), start=1):
        if line.strip():
            file = Path(os.path.abspath(path.parent / os.fsdecode(line)))
            if not skip_unreadable and not os.path.isfile(file):
                raise UserError(
                    f"{path} line {number}: {_missing(file)}; correct the list, or leave out what cannot be read with "
                    "--skip_unreadable"
                )
            files.append(file)
    if not files:
        raise UserError(f"{path} lists no images; it must have one path in each line")
    return files


def _missing(path: Path) -> str:
    name = str(path)
    near = near_file(path) if "\0" not in name else None
    return f"{shown_path(name)} does not exist{f', but {near}' if near else ''}"


def _note_repeated(files: list[Path]) -> None:
    """Say once how many images are named more than once, also by a link."""
    count = Counter(os.path.realpath(file) if os.path.islink(file) else str(file) for file in files)
    repeated = [name for name, times in count.items() if times > 1]
    if repeated:
        warnings.warn(
            f"{len(repeated):,} of {len(count):,} images are named more than once, such as {shown_path(repeated[0])}; "
            "each of their names has a row of its own",
            UserNote,
            stacklevel=3,
        )
