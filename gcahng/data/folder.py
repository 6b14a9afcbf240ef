"""Any folder with train/CLASS/, test/CLASS/ and optionally val/CLASS/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gcahng.data.class_folders import ClassFolders, left_out_of, names_in, scan
from gcahng.data.listing import DataSetFiles, Entry, NoteDifference
from gcahng.data.spec import DataSetSpec, key_of, not_found

# The split of each folder. query/ and gallery/ together take the place of test/.
_SPLITS = {"train": "train", "val": "val", "test": "test", "query": "test", "gallery": "gallery"}
_LAYOUT = """train/CLASS/: images of the training classes
test/CLASS/: images of other classes (or query/CLASS/ and gallery/CLASS/)
val/CLASS/: optional, images of still other classes"""
_SOURCE = "Make one folder for each class, and put the whole folder into train/ or into test/"


def find(root: Path, csv: Path | None) -> DataSetFiles:
    """The class folders below `root`."""
    folders = [name for name in _SPLITS if (root / name).is_dir()]
    has_test = "test" in folders or {"query", "gallery"} <= set(folders)
    missing = [*([] if "train" in folders else ["train/"]), *([] if has_test else ["test/"])]
    if missing:
        raise not_found("folder", root, missing, _LAYOUT, _SOURCE)
    if "test" in folders:
        folders = [name for name in folders if name not in ("query", "gallery")]
    scanned = [scan(root, name) for name in folders]
    key = key_of("folder", *(line for folder in scanned for line in names_in(folder)))
    return DataSetFiles(root, key, lambda note: _entries(scanned, note), left_out_of(scanned))


def _entries(scanned: list[ClassFolders], note: NoteDifference) -> Iterator[Entry]:
    for folder in scanned:
        for name, path in folder.paths(note):
            yield Entry(_SPLITS[folder.below], path, name, name, f"{folder.below}/{name}/")


SPEC = DataSetSpec(
    name="folder",
    title="class folders",
    find=find,
    layout=_LAYOUT,
    source=_SOURCE,
    trap="class folders with the same name in train/ and test/ are an image-level split, which is an error",
)
