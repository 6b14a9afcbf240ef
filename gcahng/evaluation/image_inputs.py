"""The images that a user names: a split of a data set, folders, lists of paths, single files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch

from gcahng.data import DataSplits, ImageFiles, LabeledImages, load_data
from gcahng.data.config import DataConfig, DataName
from gcahng.errors import UserError
from gcahng.files import regular_file
from gcahng.retrieval.items import Items, Source

SPLITS = ("test", "train", "val", "gallery")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
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
        config = replace(config, root=None, csv=None, val_classes=None, train_classes=defaults.train_classes)
    known = {field.name for field in fields(DataConfig)}
    unknown = set(options) - known
    if unknown:
        raise UserError(f"data.{min(unknown)} is not an option; it must be one of {', '.join(sorted(known))}")
    if name not in get_args(DataName):
        raise UserError(f"data.name is {name!r}; it must be one of {', '.join(get_args(DataName))}")
    config = replace(config, **options)
    config.check()
    return config


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


def files_images(paths: Sequence[Path], *, labels_from_folders: bool = False) -> tuple[ImageFiles, Items]:
    """The images that image files, folders (with all folders in them) and lists of paths name.

    A list is a .txt or .lst file with one path in each line, relative to the list's folder. The root of the images is
    the folder itself where one folder is given, otherwise the folder that all images have in common.

    Args:
        paths: what is named. The images come in this order; those of a folder are sorted by their path.
        labels_from_folders: whether the name of an image's folder is its class; otherwise images have no class.

    Returns:
        The images, and what they are.

    Raises:
        UserError: a path does not exist or is no image, or a folder or a list has no images.
    """
    if not paths:
        raise UserError("no images are given; name image files, folders or lists of paths")
    files = [file for path in paths for file in _files_of(Path(path))]
    root = (
        paths[0] if len(paths) == 1 and Path(paths[0]).is_dir() else Path(os.path.commonpath([f.parent for f in files]))
    )
    root = Path(os.path.abspath(root))
    names = tuple(os.path.relpath(file, root).replace(os.sep, "/") for file in files)
    class_names: tuple[str, ...] = ()
    labels = torch.full((len(files),), -1)
    if labels_from_folders:
        folders = [file.parent.name for file in files]
        class_names = tuple(sorted(set(folders)))
        places = {name: i for i, name in enumerate(class_names)}
        labels = torch.tensor([places[folder] for folder in folders])
    images = ImageFiles(root, names, labels, class_names)
    return images, Items(names, labels, class_names, (Source(len(files), str(root)),))


def _files_of(path: Path) -> list[Path]:
    """The absolute image files that `path` means."""
    if path.is_dir():
        files = [
            Path(folder, name)
            for folder, _, names in os.walk(os.path.abspath(path))
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
        if not files:
            raise UserError(f"{path} holds no images; it must hold files that end in {', '.join(IMAGE_SUFFIXES)}")
        return sorted(files)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        if not path.is_file():
            raise UserError(f"{path} does not exist; name an image, a folder or a list of paths")
        return [Path(os.path.abspath(path))]
    if path.suffix.lower() in LIST_SUFFIXES and path.is_file():
        try:
            lines = regular_file(path).read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        files = [Path(os.path.abspath(path.parent / line)) for line in lines if line.strip()]
        if not files:
            raise UserError(f"{path} lists no images; it must have one path in each line")
        return files
    if not path.exists():
        raise UserError(f"{path} does not exist; name an image, a folder or a list of paths")
    raise UserError(
        f"{path} is neither an image ({', '.join(IMAGE_SUFFIXES)}) nor a list of paths ({', '.join(LIST_SUFFIXES)})"
    )
