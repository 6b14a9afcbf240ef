"""Images listed in a CSV file with the columns path, label and split."""

from __future__ import annotations

import csv as csv_module
import io
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from gcahng.data.listing import DataSetFiles, Difference, Entry, NoteDifference, bad_line, read_bytes, split_lines
from gcahng.data.oml_csv import GALLERY, QUERY, OmlRows
from gcahng.data.spec import DataSetSpec, key_of
from gcahng.errors import UserError

_COLUMNS = ("path", "label", "split")
_SPLITS = {"train": "train", "val": "val", "test": "test", "query": "test", "gallery": "gallery"}
_LAYOUT = f"""a header with the columns path, label and split, then one line for each image
path: relative to root, or to the folder of the CSV file if no root is given
split: train, val (optional), test (or query and gallery); or train and validation with the columns {QUERY} and \
{GALLERY}, as OML's tables have them"""
_SOURCE = "Write one with Python's csv module, or export one from a spreadsheet as UTF-8"


def find(root: Path, csv: Path | None) -> DataSetFiles:
    """The images below `root` that `csv` lists."""
    assert csv is not None
    if not os.path.isfile(csv):
        raise UserError(f"data.csv is {csv}, which is not a file; it must be a CSV file of path, label and split")
    return DataSetFiles(root, key_of("csv", files=[csv]), lambda note: _entries(csv, root, note))


def _entries(path: Path, root: Path, note: NoteDifference) -> Iterator[Entry]:
    content = read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = len(split_lines(content[: error.start]))
        note(bad_line(path, number, repr(split_lines(content)[number - 1])[1:], "UTF-8 text"))
        return
    rows = _rows(text, path, note)
    header = [name.strip() for name in next(rows, (1, []))[1]]
    if not set(_COLUMNS) <= set(header):
        note(bad_line(path, 1, ",".join(header), f"a header with the columns {', '.join(_COLUMNS)}"))
        return
    of_oml = {QUERY, GALLERY} & set(header)
    if len(of_oml) == 1:
        note(bad_line(path, 1, ",".join(header), f"a header with both {QUERY} and {GALLERY}, or with neither"))
        return
    oml = OmlRows(note) if of_oml else None
    first_line_of: dict[str, str] = {}
    for number, fields in rows:
        where = f"{path.name} line {number}"
        if len(fields) != len(header):
            many = f"{len(fields)} fields" + (", over several lines" if any("\n" in field for field in fields) else "")
            note(Difference(f"{where} has {many}", f"it must have {len(header)}, like the header of {path}"))
            continue
        row = {name: field.strip() for name, field in zip(header, fields, strict=True)}
        image, label, split = _path(fields[header.index("path")], root), row["label"], row["split"]
        if not image.strip() or not label or (oml is None and split not in _SPLITS):
            expected = f"a path, a label and a split of {', '.join(_SPLITS)}"
            if split == "validation":
                expected += f" (validation needs the columns {QUERY} and {GALLERY}, as OML's tables have them)"
            note(bad_line(path, number, ",".join(fields), expected))
            continue
        own = _SPLITS[split] if oml is None else oml.split_of(row, where)
        if own is None:
            continue
        first_line_of.setdefault(split, where)
        yield Entry(own, image, label, label, where)
    if "test" in first_line_of and (others := [name for name in ("query", "gallery") if name in first_line_of]):
        note(
            Difference(
                f"{first_line_of[others[0]]} has the split {others[0]} and {first_line_of['test']} has test",
                "use either test alone, or query and gallery",
            )
        )


def _path(field: str, root: Path) -> str:
    """The path of a field, without spaces at its ends unless there is a file whose name has them."""
    bare = field.strip()
    exact = field != bare and "\0" not in field and os.path.lexists(os.path.join(root, field))
    if not bare:
        return ""
    path, folder = PurePosixPath(field if exact else bare), os.path.abspath(root)
    # OML's tables may have the whole path of an image.
    return str(path.relative_to(folder) if path.is_absolute() and path.is_relative_to(folder) else path)


def _rows(text: str, path: Path, note: NoteDifference) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first line and the fields of each row that is not blank."""
    rows = csv_module.reader(io.StringIO(text, newline=""))
    first = 1
    try:
        for row in rows:
            if any(field.strip() for field in row):
                yield first, row
            first = rows.line_num + 1
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
