"""Cars196 (Stanford Cars) in three layouts. Classes 1–98 train and 99–196 test; its own split is ignored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gcahng.data.class_folders import ClassFolders, left_out_of, names_in, scan
from gcahng.data.listing import DataMismatch, DataSetFiles, Difference, Entry, NoteDifference, locate
from gcahng.data.spec import Counts, DataSetSpec, key_of, not_found
from gcahng.extras import require

CLASSES = 196
TRAIN_CLASSES = 98
# Class numbers follow the makes: 1 is the AM General Hummer, 98 the Eagle Talon, 99 the first FIAT.
TRAIN_MAKES = (
    "am", "acura", "aston", "audi", "bmw", "bentley", "bugatti", "buick", "cadillac", "chevrolet", "chrysler", "daewoo",
    "dodge", "eagle",
)  # fmt: skip
TEST_MAKES = (
    "fiat", "ferrari", "fisker", "ford", "gmc", "geo", "hummer", "honda", "hyundai", "infiniti", "isuzu", "jaguar",
    "jeep", "lamborghini", "land", "lincoln", "mini", "maybach", "mazda", "mclaren", "mercedes", "mitsubishi", "nissan",
    "plymouth", "porsche", "ram", "rolls", "scion", "spyker", "suzuki", "tesla", "toyota", "volkswagen", "volvo",
    "smart",
)  # fmt: skip
_TEST_LABELS = "cars_test_annos_withlabels.mat"
_LAYOUT = f"""1. cars_annos.mat and car_ims/
2. devkit/cars_train_annos.mat, {_TEST_LABELS} (here or in devkit/), cars_train/ and cars_test/
3. class folders, named after the classes or by their numbers, here or below train/ and test/"""
_SOURCE = (
    "The original page, https://ai.stanford.edu/~jkrause/cars/car_dataset.html, no longer serves the files. "
    "torchvision.datasets.StanfordCars and Kaggle's copies of Stanford Cars have layouts 2 and 3"
)


def find(root: Path, csv: Path | None) -> DataSetFiles:
    """The files in the first layout that matches `root`, or its folder stanford_cars or car_data."""
    below = ("stanford_cars", "car_data", "car_data/car_data")
    if (base := locate(root, "cars_annos.mat", *below)) is not None:
        annotations = base / "cars_annos.mat"
        key = key_of("cars196", "1", files=[annotations])
        return DataSetFiles(base, key, lambda note: _annotated(annotations, annotations, "relative_im_path", "", note))
    if (base := locate(root, "devkit/cars_train_annos.mat", *below)) is not None:
        return _find_devkit(base)
    for base in (root, *(root / name for name in below)):
        folders = [name for name in ("train", "test") if (base / name).is_dir()] or [""]
        scanned = [scan(base, name) for name in folders] if base.is_dir() else []
        if any(_class_of(name) is not None for folder in scanned for name in folder.classes):
            key = key_of("cars196", "3", *(line for folder in scanned for line in names_in(folder)))
            left_out = left_out_of(scanned)
            return DataSetFiles(base, key, lambda note, scanned=scanned: _foldered(scanned, note), left_out)
    missing = ["cars_annos.mat", "devkit/cars_train_annos.mat", "class folders"]
    raise not_found("cars196", root, missing, _LAYOUT, _SOURCE)


def _find_devkit(base: Path) -> DataSetFiles:
    labels_folder = locate(base, _TEST_LABELS, "devkit")
    if labels_folder is None:
        missing = [f"{_TEST_LABELS} (cars_test_annos.mat has no classes)"]
        raise not_found("cars196", base, missing, _LAYOUT, _SOURCE)
    train, test = base / "devkit" / "cars_train_annos.mat", labels_folder / _TEST_LABELS
    names = base / "devkit" / "cars_meta.mat"

    def entries(note: NoteDifference) -> Iterator[Entry]:
        yield from _annotated(train, names, "fname", "cars_train/", note)
        yield from _annotated(test, names, "fname", "cars_test/", note)

    files = [train, test, *([names] if names.is_file() else [])]
    return DataSetFiles(base, key_of("cars196", "2", files=files), entries)


def _annotated(path: Path, names_from: Path, path_field: str, below: str, note: NoteDifference) -> Iterator[Entry]:
    annotations = _load_mat(path).get("annotations")
    fields = annotations.dtype.names or () if annotations is not None else ()
    if path_field not in fields or "class" not in fields:
        remedy = f"it must have annotations with {path_field} and class: restore the original file"
        note(Difference(f"{path} has no annotations with {path_field} and class", remedy))
        return
    names = _class_names(names_from)
    for number, annotation in enumerate(annotations.ravel(), start=1):
        where = f"{path.name} annotation {number}"
        name, label = _scalar(annotation[path_field]), _scalar(annotation["class"])
        if not isinstance(name, str) or not isinstance(label, int) or not 1 <= label <= CLASSES:
            remedy = f"it must have a path and a class from 1 to {CLASSES}: restore the original {path}"
            note(Difference(f"{where} has the path {name!r} and the class {label!r}", remedy))
            continue
        title = names[label - 1] if label <= len(names) else f"{label:03}"
        image = name if name.startswith("/") else below + name
        yield Entry(_split_of(label), image, label, title, where)


def _foldered(scanned: list[ClassFolders], note: NoteDifference) -> Iterator[Entry]:
    noted = set()
    for folder in scanned:
        for name, path in folder.paths(note):
            label = _class_of(name)
            if label is None:
                if name not in noted:
                    noted.add(name)
                    remedy = (
                        "its name must start with the make, as in Acura RL Sedan 2012, or with the number of the class"
                    )
                    note(Difference(f"{name}/ is not a class of Cars196", f"{remedy}: rename or remove it"))
                continue
            split = _split_of(label) if isinstance(label, int) else label
            yield Entry(split, path, name, name, f"{path.rpartition('/')[0]}/")


def _split_of(label: int) -> str:
    return "train" if label <= TRAIN_CLASSES else "test"


def _class_of(folder: str) -> int | str | None:
    """The class number at the start of a folder's name, else the split that its make belongs to, else None."""
    if number := re.match(r"\d+", folder):
        label = int(number.group())
        return label if 1 <= label <= CLASSES else None
    make = re.split(r"[ _-]", folder.casefold(), maxsplit=1)[0]
    return "train" if make in TRAIN_MAKES else "test" if make in TEST_MAKES else None


def _class_names(path: Path) -> list[str]:
    """The names of the classes 1 …; empty if the file is missing or names none."""
    names = _load_mat(path).get("class_names") if path.is_file() else None
    return [] if names is None else [str(_scalar(name)) for name in names.ravel()]


def _load_mat(path: Path) -> dict[str, Any]:
    require("scipy", extra="train", purpose="reading the .mat files of Cars196")
    from scipy.io import loadmat

    try:
        return loadmat(path)
    except Exception as error:  # scipy raises what its decoders raise: ValueError, TypeError, zlib.error, OSError …
        raise DataMismatch(
            Difference(f"{path} cannot be read as a MATLAB file: {error}", "restore the original file")
        ) from None


def _scalar(value: Any) -> Any:
    """The only element of a MATLAB array as an int or str; None if the array has another size."""
    if getattr(value, "size", 1) != 1:
        return None
    item = value.item() if hasattr(value, "item") else value
    return _scalar(item) if hasattr(item, "item") else item


SPEC = DataSetSpec(
    name="cars196",
    title="Cars196",
    find=find,
    layout=_LAYOUT,
    source=_SOURCE,
    trap="cars_train/ and cars_test/ (8,144 and 8,041 images), and train/ and test/ made from them, have all 196 "
    "classes on both sides. They are merged and then split by class",
    expected={"train": Counts(8054, 98), "test": Counts(8131, 98)},
)
