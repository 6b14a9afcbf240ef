"""CUB-200-2011: classes 1–100 train and 101–200 test. Its own train_test_split.txt, another split, is not read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gcahng.data.listing import DataSetFiles, Difference, Entry, NoteDifference, bad_line, lines_of, locate
from gcahng.data.spec import Counts, DataSetSpec, key_of, missing_from, not_found

CLASSES = 200
TRAIN_CLASSES = 100
_LAYOUT = """images.txt: lines `image_id path`
image_class_labels.txt: lines `image_id class_id`
images/: the files, in one folder for each class"""
_SOURCE = "Get CUB_200_2011.tgz from https://www.vision.caltech.edu/datasets/cub_200_2011/ and unpack it"


def find(root: Path, csv: Path | None) -> DataSetFiles:
    """The label files in `root` or in its folder CUB_200_2011."""
    base = locate(root, "images.txt", "CUB_200_2011") or root
    if missing := missing_from(base, ("images.txt", "image_class_labels.txt", "images/")):
        raise not_found("cub200", base, missing, _LAYOUT, _SOURCE)
    files = [base / "images.txt", base / "image_class_labels.txt"]
    return DataSetFiles(base, key_of("cub200", files=files), lambda note: _entries(*files, note))


def _entries(images: Path, labels: Path, note: NoteDifference) -> Iterator[Entry]:
    classes: dict[str, int] = {}
    for number, line in lines_of(labels, note):
        fields = line.split()
        if len(fields) != 2 or not all(field.isdecimal() for field in fields) or not 1 <= int(fields[1]) <= CLASSES:
            note(bad_line(labels, number, line, f"`image_id class_id` with a class from 1 to {CLASSES}"))
        elif fields[0] in classes:
            note(_listed_before(labels, number, fields[0]))
        else:
            classes[fields[0]] = int(fields[1])
    listed = set()
    for number, line in lines_of(images, note):
        image, _, path = line.partition(" ")
        if not image.isdecimal() or not path.strip():
            note(bad_line(images, number, line, "`image_id path`"))
            continue
        if image in listed:
            note(_listed_before(images, number, image))
            continue
        listed.add(image)
        where = f"{images.name} line {number}"
        if image not in classes:
            note(Difference(f"{where}: image {image} has no class in {labels.name}", f"restore the original {labels}"))
            continue
        label, path = classes[image], path.strip()
        split = "train" if label <= TRAIN_CLASSES else "test"
        yield Entry(split, f"images/{path}" if not path.startswith("/") else path, label, path.split("/")[0], where)
    for image in classes:
        if image not in listed:
            note(Difference(f"{labels.name}: image {image} is not in {images.name}", f"restore the original {images}"))


def _listed_before(path: Path, number: int, image: str) -> Difference:
    return Difference(f"{path.name} line {number}: image {image} was listed before", f"restore the original {path}")


SPEC = DataSetSpec(
    name="cub200",
    title="CUB-200-2011",
    find=find,
    layout=_LAYOUT,
    source=_SOURCE,
    trap="train_test_split.txt has all 200 classes on both sides (5,994 and 5,794 images). It is never read. "
    "A tree whose train/ and test/ folders share classes was made from it",
    expected={"train": Counts(5864, 100), "test": Counts(5924, 100)},
)
