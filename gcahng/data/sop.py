"""Stanford Online Products: Ebay_train.txt trains and Ebay_test.txt tests. The class is `class_id`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gcahng.data.listing import DataSetFiles, Entry, NoteDifference, bad_line, lines_of, locate
from gcahng.data.spec import Counts, DataSetSpec, key_of, missing_from, not_found

_HEADER = "image_id class_id super_class_id path"
_FILES = {"train": "Ebay_train.txt", "test": "Ebay_test.txt"}
_LAYOUT = f"""Ebay_train.txt, Ebay_test.txt: a header, then lines `{_HEADER}`
bicycle_final/ … toaster_final/: the files, in one folder for each super class"""
_SOURCE = "Get Stanford_Online_Products.zip from https://cvgl.stanford.edu/projects/lifted_struct/ and unpack it"


def find(root: Path, csv: Path | None) -> DataSetFiles:
    """The label files in `root` or in its folder Stanford_Online_Products."""
    base = locate(root, _FILES["train"], "Stanford_Online_Products") or root
    if missing := missing_from(base, _FILES.values()):
        raise not_found("sop", base, missing, _LAYOUT, _SOURCE)
    files = [base / name for name in _FILES.values()]
    return DataSetFiles(base, key_of("sop", files=files), lambda note: _entries(base, note))


def _entries(base: Path, note: NoteDifference) -> Iterator[Entry]:
    for split, name in _FILES.items():
        lines = lines_of(base / name, note)
        number, header = next(lines, (1, ""))
        if header.split() != _HEADER.split():
            note(bad_line(base / name, number, header, f"the header `{_HEADER}`"))
        for number, line in lines:
            fields = line.split(maxsplit=3)
            if len(fields) != 4 or not all(field.isdecimal() for field in fields[:3]):
                note(bad_line(base / name, number, line, f"`{_HEADER}`"))
            else:
                yield Entry(split, fields[3], int(fields[1]), fields[1], f"{name} line {number}")


SPEC = DataSetSpec(
    name="sop",
    title="Stanford Online Products",
    find=find,
    layout=_LAYOUT,
    source=_SOURCE,
    trap="the class is class_id (22,634 of them), neither super_class_id (12) nor the number in the file name. "
    "Classes that are in both Ebay_train.txt and Ebay_test.txt are an image-level split",
    recall_at=(1, 10, 100, 1000),
    expected={"train": Counts(59551, 11318), "test": Counts(60502, 11316)},
)
