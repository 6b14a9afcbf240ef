"""Images listed in a CSV file with the columns path, label and split."""

from __future__ import annotations

import csv as csv_module
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from gcahng.data.listing import DataSetFiles, Difference, Entry, NoteDifference, bad_line, read_bytes
from gcahng.data.spec import DataSetSpec, key_of
from gcahng.errors import UserError

_COLUMNS = ("path", "label", "split")
_SPLITS = {"train": "train", "val": "val", "test": "test", "query": "test", "gallery": "gallery"}
_LAYOUT = """a header with the columns path, label and split, then one line for each image
path: relative to root, or to the folder of the CSV file if no root is given
split: train, val (optional), test (or query and gallery)"""
_SOURCE = "Write one with Python's csv module, or export one from a spreadsheet as UTF-8"


def find(root: Path, csv: Path | None) -> DataSetFiles:
    """The images below `root` that `csv` lists."""
    assert csv is not None
    if not csv.is_file():
        raise UserError(f"data.csv is {csv}, which is not a file; it must be a CSV file of path, label and split")
    return DataSetFiles(root, key_of("csv", files=[csv]), lambda note: _entries(csv, note))


def _entries(path: Path, note: NoteDifference) -> Iterator[Entry]:
    content = read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        note(bad_line(path, number, repr(content.split(b"\n")[number - 1])[1:], "UTF-8 text"))
        return
    rows = _rows(text, path, note)
    header = [name.strip() for name in next(rows, (1, []))[1]]
    if not set(_COLUMNS) <= set(header):
        note(bad_line(path, 1, ",".join(header), f"a header with the columns {', '.join(_COLUMNS)}"))
        return
    places = [header.index(name) for name in _COLUMNS]
    first_line_of: dict[str, str] = {}
    for number, row in rows:
        where = f"{path.name} line {number}"
        if len(row) != len(header):
            note(Difference(f"{where} has {len(row)} fields", f"it must have {len(header)}, like the header of {path}"))
            continue
        image, label, split = (row[place].strip() for place in places)
        if not image or not label or split not in _SPLITS:
            expected = f"a path, a label and a split of {', '.join(_SPLITS)}"
            note(bad_line(path, number, ",".join(row), expected))
            continue
        first_line_of.setdefault(split, where)
        yield Entry(_SPLITS[split], str(PurePosixPath(image)), label, label, where)
    if "test" in first_line_of and (others := [name for name in ("query", "gallery") if name in first_line_of]):
        note(
            Difference(
                f"{first_line_of[others[0]]} has the split {others[0]} and {first_line_of['test']} has test",
                "use either test alone, or query and gallery",
            )
        )


def _rows(text: str, path: Path, note: NoteDifference) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the fields of each row that is not blank."""
    rows = csv_module.reader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            if any(field.strip() for field in row):
                yield rows.line_num, row
    except csv_module.Error as error:
        note(Difference(f"{path.name} line {rows.line_num} is not valid CSV: {error}", f"correct {path}"))


SPEC = DataSetSpec(
    name="csv",
    title="CSV of path, label, split",
    find=find,
    layout=_LAYOUT,
    source=_SOURCE,
    trap="a label that has both train and test images is an image-level split, which is an error",
)
