"""In-Shop Clothes Retrieval (DeepFashion): list_eval_partition.txt lists training, query and gallery images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gcahng.data.listing import DataSetFiles, Difference, Entry, NoteDifference, bad_line, lines_of, locate
from gcahng.data.spec import Counts, DataSetSpec, key_of, not_found

_LIST = "list_eval_partition.txt"
_HEADER = "image_name item_id evaluation_status"
_SPLITS = {"train": "train", "query": "test", "gallery": "gallery"}
_LAYOUT = f"""Eval/{_LIST} (or {_LIST}): a count, a header, then lines `{_HEADER}`
img/ (or Img/img/): the files of img.zip, unpacked"""
_SOURCE = (
    "Get In-shop Clothes Retrieval from https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html "
    "and unpack img.zip"
)


def find(root: Path, csv: Path | None) -> DataSetFiles:
    """The list and the images in `root`. Both may be in the folders that the archives put them in."""
    lists, base = locate(root, _LIST, "Eval"), locate(root, "img", "Img")
    if lists is None or base is None:
        missing = [*([f"Eval/{_LIST}"] if lists is None else []), *(["img/"] if base is None else [])]
        raise not_found("inshop", root, missing, _LAYOUT, _SOURCE)
    path = lists / _LIST
    below = "" if base == root else f"{base.name}/"
    return DataSetFiles(root, key_of("inshop", below, files=[path]), lambda note: _entries(path, below, note))


def _entries(path: Path, below: str, note: NoteDifference) -> Iterator[Entry]:
    lines = lines_of(path, note)
    number, count = next(lines, (1, ""))
    if not count.isdecimal():
        note(bad_line(path, number, count, "the number of images"))
    number, header = next(lines, (2, ""))
    if header.split() != _HEADER.split():
        note(bad_line(path, number, header, f"the header `{_HEADER}`"))
    listed = 0
    for number, line in lines:
        listed += 1
        fields = line.split()
        if len(fields) != 3 or fields[2] not in _SPLITS:
            note(bad_line(path, number, line, f"`{_HEADER}` with a status of {', '.join(_SPLITS)}"))
            continue
        name, item, status = fields
        image = name if name.startswith("/") else below + name
        yield Entry(_SPLITS[status], image, item, item, f"{path.name} line {number}")
    if count.isdecimal() and int(count) != listed:
        note(
            Difference(
                f"{path.name} line 1 says {int(count):,} images and {listed:,} lines follow",
                f"restore the original {path}",
            )
        )


SPEC = DataSetSpec(
    name="inshop",
    title="In-Shop Clothes Retrieval",
    find=find,
    layout=_LAYOUT,
    source=_SOURCE,
    trap="queries are searched in the gallery, which has the same items. A training item that is also a query or "
    "gallery item is an image-level split. Some training items have a single image",
    recall_at=(1, 10, 20, 30, 40, 50),
    expected={"train": Counts(25882, 3997), "test": Counts(14218, 3985), "gallery": Counts(12612, 3985)},
)
