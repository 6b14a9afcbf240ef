"""Any folder of class folders: train/CLASS/, test/CLASS/ and, where there are some, val/CLASS/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gcahng.data.class_folders import ClassFolders, names_in, scan
from gcahng.data.listing import DataSetFiles, Entry, ReportDifference
from gcahng.data.spec import DataSetSpec, key_of, not_found

# Folder and split; query/ and gallery/ take the place of test/.
_SPLITS = {"train": "train", "val": "val", "test": "test", "query": "test", "gallery": "gallery"}
_LAYOUT = """train/CLASS/: images of the classes that train
test/CLASS/: images of other classes (or query/CLASS/ and gallery/CLASS/)
val/CLASS/: optional, of yet other classes"""
_SOURCE = "Make one folder a class, and move each class folder as a whole to train/ or to test/"


def find(root: Path, csv: Path | None) -> DataSetFiles:
    """The class folders below `root`."""
    folders = [name for name in _SPLITS if (root / name).is_dir()]
    has_test = "test" in folders or {"query", "gallery"} <= set(folders)
    lacks = [*([] if "train" in folders else ["train/"]), *([] if has_test else ["test/"])]
    if lacks:
        raise not_found("folder", root, lacks, _LAYOUT, _SOURCE)
    if "test" in folders:
        folders = [name for name in folders if name not in ("query", "gallery")]
    scanned = [scan(root, name) for name in folders]
    key = key_of("folder", *(line for each in scanned for line in names_in(each)))
    return DataSetFiles(root, key, lambda report: _entries(scanned, report))


def _entries(scanned: list[ClassFolders], report: ReportDifference) -> Iterator[Entry]:
    for each in scanned:
        for name, path in each.paths(report):
            yield Entry(_SPLITS[each.below], path, name, name, f"{each.below}/{name}/")


SPEC = DataSetSpec(
    name="folder",
    title="class folders",
    find=find,
    layout=_LAYOUT,
    source=_SOURCE,
    trap="train/ and test/ with class folders of the same names are an image-level split, and are refused",
)
