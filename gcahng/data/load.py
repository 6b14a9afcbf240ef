"""The data set that a configuration names."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gcahng.data import cars196, csv_file, cub200, folder, inshop, sop
from gcahng.data.glyphs import load_glyphs
from gcahng.data.image_set import DataSplits, ImageFiles
from gcahng.data.index import read_index, write_index
from gcahng.data.listing import SPLITS, DataMismatch, DataSetFiles, Listing, SplitFiles, collect, raise_difference
from gcahng.data.spec import DataSetSpec
from gcahng.errors import UserError, UserNote
from gcahng.paths import check_source

if TYPE_CHECKING:
    from gcahng.data.config import DataConfig

DATA_SETS = {module.SPEC.name: module.SPEC for module in (cub200, cars196, sop, inshop, folder, csv_file)}
# Fixed, so that runs with different seeds choose their best checkpoint on the same classes.
VAL_SEED = 20250


def load_data(config: DataConfig) -> DataSplits:
    """Load the splits of the data set `config.name`.

    Files are read where they are. Their number is not checked; `gcahng data verify` does that.

    Raises:
        UserError: a file is missing or differs from the data set, a class is in two splits, or an option does not fit
            the data set.
    """
    if config.name == "glyphs":
        val_classes = 100 if config.val_classes is None else config.val_classes
        return load_glyphs(config.train_classes, val_classes, merge_lookalikes=config.merge_lookalikes)
    spec = DATA_SETS[config.name]
    try:
        data_files = find_files(spec, config.root, config.csv)
        listing = read_index(spec.name, data_files)
        if listing is None:
            listing = collect(data_files, raise_difference)
            write_index(spec.name, data_files, listing)
    except DataMismatch as error:
        options = [f"--{name} {value}" for name, value in (("root", config.root), ("csv", config.csv)) if value]
        command = " ".join(["gcahng data verify", spec.name, *options])
        raise UserError(f"{error}. `{command}` lists everything that differs") from None
    if data_files.left_out and int(os.environ.get("RANK", 0)) == 0:  # of processes that torchrun starts, one says it
        warnings.warn(f"left out of {data_files.root}: {data_files.left_out}", UserNote, stacklevel=2)
    return _splits(spec, listing, config.val_classes, config.rotates)


def find_files(spec: DataSetSpec, root: str | None, csv: str | None) -> DataSetFiles:
    """Find the files of a data set below `root`.

    Raises:
        UserError: `root` or `csv` does not fit the data set, or does not exist.
        DataMismatch: label files or folders are missing.
    """
    if csv is not None and spec.name != "csv":
        raise UserError(f"data.csv is {csv} and data.name is {spec.name}; a CSV file needs data.name=csv")
    if csv is None and spec.name == "csv":
        raise UserError(f"data.csv is not given; data.name=csv needs a file with {'; '.join(_lines(spec.layout))}")
    if root is None and csv is None:
        raise UserError(f"data.root is not given; {spec.name} needs the folder of {'; '.join(_lines(spec.layout))}")
    folder_path = None if root is None else _expanded("data.root", root)
    if folder_path is not None and not folder_path.is_dir():
        where = "" if folder_path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(
            f"data.root is {root}, which is not a folder{where}; it must be the folder with the files of {spec.name}"
        )
    csv_path = None if csv is None else _expanded("data.csv", csv)
    return spec.find(folder_path or csv_path.parent, csv_path)  # type: ignore[union-attr]  # one of them was given


def _expanded(name: str, path: str) -> Path:
    check_source(name, os.path.expanduser(path))  # which leaves ~ where there is no such user
    return Path(os.path.expanduser(path))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def _splits(spec: DataSetSpec, listing: Listing, val_classes: int | None, exif_rotate: bool) -> DataSplits:
    splits = dict(listing.splits)
    own_val = splits.pop("val", None)
    if own_val is not None and val_classes:
        raise UserError(
            f"data.val_classes is {val_classes} and the data set has validation classes of its own; it must be null to "
            "use them, or 0 to use none"
        )
    if own_val is None:
        count = _val_count(len(splits["train"].class_names), val_classes)
        splits["train"], own_val = _set_aside(splits["train"], count) if count else (splits["train"], None)
    if own_val is not None and val_classes != 0:
        splits["val"] = own_val
    files = {name: _image_files(listing.root, splits[name], exif_rotate) for name in SPLITS if name in splits}
    return DataSplits(
        train=files["train"],
        val=files.get("val"),
        test=files["test"],
        digest=_digest(splits, exif_rotate=exif_rotate),
        gallery=files.get("gallery"),
        recall_at=spec.recall_at,
        listing=_digest(splits, sizes=False),
    )


def _val_count(classes: int, asked: int | None) -> int:
    """How many training classes to validate on: `asked`, or else a tenth, but at least 2."""
    count = max(2, round(classes / 10)) if asked is None else asked
    if count and not 2 <= count <= classes - 2:
        value = f"null, which means {count}" if asked is None else str(count)
        some = f", or from 2 to {classes - 2} so that 2 or more train" if classes >= 4 else ""
        raise UserError(f"data.val_classes is {value} of {classes} training classes; it must be 0{some}")
    return count


def _set_aside(train: SplitFiles, count: int) -> tuple[SplitFiles, SplitFiles]:
    """Split the classes into training and validation, each numbered from 0. A larger `count` only adds classes."""
    # RandomState, unlike numpy's newer generators, promises the same numbers in every version.
    order = np.random.RandomState(VAL_SEED).permutation(len(train.class_names))
    chosen = {int(label) for label in order[:count]}
    rest = set(range(len(train.class_names))) - chosen
    return _with_classes(train, rest), _with_classes(train, chosen)


def _with_classes(files: SplitFiles, classes: set[int]) -> SplitFiles:
    numbers = {label: number for number, label in enumerate(sorted(classes))}
    rows = [i for i, label in enumerate(files.labels) if label in numbers]
    return SplitFiles(
        paths=[files.paths[i] for i in rows],
        labels=[numbers[files.labels[i]] for i in rows],
        class_names=[files.class_names[label] for label in numbers],
        sizes=[files.sizes[i] for i in rows],
    )


def _image_files(root: Path, files: SplitFiles, exif_rotate: bool) -> ImageFiles:
    return ImageFiles(root, files.paths, torch.tensor(files.labels), tuple(files.class_names), exif_rotate)


def _digest(splits: dict[str, SplitFiles], *, sizes: bool = True, exif_rotate: bool = False) -> str:
    # Images as they are stored have the digest that they had before there was a choice.
    digest = hashlib.sha256(b"exif_rotate\n" if exif_rotate else b"")
    for name in SPLITS:
        if name in splits:
            files = splits[name]
            lines = (
                f"{path}\0{files.class_names[label]}\0{size if sizes else ''}"
                for path, label, size in zip(files.paths, files.labels, files.sizes, strict=True)
            )
            digest.update("\n".join([f"{name} {len(files.paths)}", *lines, ""]).encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
