"""Each data set is read in place from its original files, and split by class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trees

from gcahng.data import DataSplits, ImageFiles, load_data, read_rgb
from gcahng.data.cars196 import TEST_MAKES, TRAIN_MAKES
from gcahng.data.config import DataConfig
from gcahng.errors import UserError, UserNote

MAKERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "cub200": ("cub200", trees.make_cub200),
    "cars196-annos": ("cars196", trees.make_cars196),
    "cars196-devkit": ("cars196", lambda root: trees.make_cars196(root, "devkit")),
    "cars196-folders": ("cars196", lambda root: trees.make_cars196(root, "folders")),
    "cars196-numbers": ("cars196", lambda root: trees.make_cars196(root, "numbers")),
    "sop": ("sop", trees.make_sop),
    "inshop": ("inshop", trees.make_inshop),
    "inshop-published": ("inshop", lambda root: trees.make_inshop(root, published=True)),
    "folder": ("folder", trees.make_folder),
    "csv": ("csv", trees.make_csv),
}


# As the papers report them.
RECALL_AT = {"sop": (1, 10, 100, 1000), "inshop": (1, 10, 20, 30, 40, 50)}


def config_of(name: str, made: Path, **fields: object) -> DataConfig:
    place = {"csv": str(made)} if name == "csv" else {"root": str(made)}
    return DataConfig(name=name, **{"val_classes": 0, **place, **fields})


def load(name: str, made: Path, **fields: object) -> DataSplits:
    return load_data(config_of(name, made, **fields))


@pytest.mark.parametrize("tree", MAKERS)
def test_splits_are_by_class_and_all_files_are_there(tree: str, tmp_path: Path) -> None:
    name, make = MAKERS[tree]
    data = load(name, make(tmp_path / "data"))
    assert data.val is None and data.recall_at == RECALL_AT.get(name, (1, 2, 4, 8))
    assert not set(data.train.class_names) & set(data.test.class_names)
    for split in (data.train, data.test, data.gallery):
        if split is None:
            continue
        assert isinstance(split, ImageFiles)
        assert all(split.file(i).is_file() for i in range(len(split)))
        assert split.labels.dtype == torch.int64 and len(split.labels) == len(split.paths)
        assert split.labels.unique().tolist() == list(range(split.num_classes))


@pytest.mark.parametrize("tree", MAKERS)
def test_each_class_has_one_color(tree: str, tmp_path: Path) -> None:
    """The trees paint a class in its own color: labels belong to the pixels, not only to the names."""
    name, make = MAKERS[tree]
    data = load(name, make(tmp_path / "data"))
    for split in (data.train, data.test):
        pixels = [np.asarray(read_rgb(split.file(i)), dtype=np.float32) for i in range(len(split))]
        means = torch.tensor(np.stack([image.mean((0, 1)) for image in pixels]))
        distances = torch.cdist(means, means)
        same = split.labels[:, None] == split.labels
        assert distances[same].max() < distances[~same].min()


def test_cub200_splits_at_class_100_and_never_reads_its_own_split(tmp_path: Path) -> None:
    root = trees.make_cub200(tmp_path / "CUB_200_2011", classes=6)
    (root / "train_test_split.txt").write_text("nonsense")
    data = load("cub200", tmp_path)  # the folder that the archive was unpacked in
    assert data.train.class_names == ("001.Some_Bird", "002.Some_Bird", "003.Some_Bird")
    assert data.test.class_names == ("101.Some_Bird", "102.Some_Bird", "103.Some_Bird")
    assert len(data.train) == len(data.test) == 12


@pytest.mark.parametrize("layout", ["annos", "devkit", "folders"])
def test_cars196_layouts_agree_on_the_classes(layout: str, tmp_path: Path) -> None:
    data = load("cars196", trees.make_cars196(tmp_path, layout))
    named = [name.replace("-", "/") for name in trees.CAR_NAMES.values()]
    assert sorted(name.replace("-", "/") for name in data.train.class_names) == sorted(named[:4])
    assert sorted(name.replace("-", "/") for name in data.test.class_names) == sorted(named[4:])
    assert data.train.labels.bincount().tolist() == [4] * 4, "both of the publishers' splits, put together"


def test_cars196_folders_with_numbers_split_after_98(tmp_path: Path) -> None:
    data = load("cars196", trees.make_cars196(tmp_path, "numbers"))
    assert data.train.class_names == ("001", "006", "047", "098") and data.test.class_names[0] == "099"


def test_cars196_needs_the_labels_of_the_test_images(tmp_path: Path) -> None:
    root = trees.make_cars196(tmp_path, "devkit")
    (root / "cars_test_annos_withlabels.mat").rename(root / "devkit" / "cars_test_annos_withlabels.mat")
    assert len(load("cars196", root).test) == 16
    (root / "devkit" / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(UserError, match=r"no cars_test_annos_withlabels.mat \(cars_test_annos.mat has no classes\)"):
        load("cars196", root)
    (root / "devkit" / "cars_test_annos.mat").rename(root / "cars_test_annos_withlabels.mat")
    with pytest.raises(UserError, match="has no annotations with fname and class"):
        load("cars196", root)


def test_cars196_has_49_makes() -> None:
    assert len({*TRAIN_MAKES, *TEST_MAKES}) == len(TRAIN_MAKES) + len(TEST_MAKES) == 49


def test_cars196_refuses_folders_of_something_else(tmp_path: Path) -> None:
    root = trees.make_cars196(tmp_path, "folders")
    (root / "train" / "FIAT 500 Abarth 2012").rename(root / "train" / "Trabant 601 1989")
    with pytest.raises(UserError, match="Trabant 601 1989/ is not a class of Cars196"):
        load("cars196", root)


def test_sop_has_the_class_of_the_column(tmp_path: Path) -> None:
    data = load("sop", trees.make_sop(tmp_path, classes=6, images=4))
    assert data.train.class_names == ("1", "2", "3") and data.test.class_names == ("4", "5", "6")
    stems = {path.split("/")[1].split("_")[0] for path in data.train.paths}
    assert len(stems) == 2, "the tree's file names have fewer numbers than there are classes"


def test_inshop_queries_and_gallery_share_classes(tmp_path: Path) -> None:
    data = load("inshop", trees.make_inshop(tmp_path, classes=6, images=4))
    assert data.train.labels.bincount().tolist() == [4, 4, 1], "an item with one image is kept"
    assert data.gallery is not None and data.gallery.class_names == data.test.class_names
    assert data.test.labels.tolist() == [0, 1, 2] and data.gallery.labels.bincount().tolist() == [3, 3, 3]


def test_inshop_class_that_only_the_gallery_has(tmp_path: Path) -> None:
    root = trees.make_inshop(tmp_path, classes=6, images=4)
    lists = root / "list_eval_partition.txt"
    lists.write_text(lists.read_text().replace("id_00000004 query", "id_00000004 gallery"))
    data = load("inshop", root)
    assert data.test.class_names == ("id_00000004", "id_00000005", "id_00000006") == data.gallery.class_names
    assert data.test.labels.tolist() == [1, 2]


def test_folder_with_validation_query_and_gallery(tmp_path: Path) -> None:
    trees.make_folder(tmp_path, classes=6, splits=("train", "val"))
    trees.make_folder(tmp_path, classes=2, splits=("query",))
    trees.make_folder(tmp_path, classes=2, splits=("gallery",))
    for c, split in ((0, "query"), (1, "query"), (0, "gallery"), (1, "gallery")):
        (tmp_path / split / f"class_{c}").rename(tmp_path / split / f"held out {c}")
    data = load("folder", tmp_path, val_classes=None)
    assert data.val is not None and data.val.class_names == ("class_1", "class_3", "class_5")
    assert data.gallery is not None and data.gallery.class_names == data.test.class_names == (
        "held out 0",
        "held out 1",
    )
    assert load("folder", tmp_path, val_classes=0).val is None
    with pytest.raises(UserError, match="data.val_classes is 2 and the data set has validation classes of its own"):
        load("folder", tmp_path, val_classes=2)


def test_folder_skips_hidden_and_other_files(tmp_path: Path) -> None:
    root = trees.make_folder(tmp_path)
    (root / "train" / "class_0" / "notes.txt").write_text("not an image")
    (root / "train" / "class_0" / "._0.png").write_text("left by a Mac")
    (root / "train" / ".cache").mkdir()
    with pytest.warns(UserNote, match=r"2 hidden \(train/.cache, train/class_0/._0.png\)$"):
        assert len(load("folder", root).train) == 12


@pytest.mark.parametrize("columns", [("path", "label", "split"), ("split", "color", "path", "label")])
def test_csv_columns_in_any_order(columns: tuple[str, ...], tmp_path: Path) -> None:
    made = trees.make_csv(tmp_path / "images")
    rows = [line.split(",") for line in made.read_text().splitlines()[1:]]
    named = [dict(zip(("path", "label", "split"), row, strict=True)) | {"color": '"a, b"'} for row in rows]
    elsewhere = tmp_path / "other.csv"
    lines = [",".join(columns), *(",".join(row[column] for column in columns) for row in named)]
    elsewhere.write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n", encoding="utf-8")
    data = load_data(DataConfig(name="csv", csv=str(elsewhere), root=str(tmp_path / "images"), val_classes=0))
    assert data.train.class_names == ("thing 0", "thing 2", "thing 4") and len(data.train) == len(data.test) == 12


def test_validation_classes_are_set_aside_from_the_training_classes(tmp_path: Path) -> None:
    root = trees.make_folder(tmp_path, classes=60, images=2)  # 30 train
    whole = load("folder", root)
    tenth = load("folder", root, val_classes=None)
    more = load("folder", root, val_classes=6)
    assert tenth.val is not None and more.val is not None
    assert (tenth.val.num_classes, tenth.train.num_classes, len(tenth.val), len(tenth.train)) == (3, 27, 6, 54)
    assert {*tenth.val.class_names, *tenth.train.class_names} == set(whole.train.class_names)
    assert set(tenth.val.class_names) < set(more.val.class_names)
    assert tenth.train.labels.unique().tolist() == list(range(27))
    for split in (tenth.val, tenth.train):
        assert all(split.class_names[label] in path for path, label in zip(split.paths, split.labels, strict=True))
    assert tenth.val.class_names == ("class_32", "class_40", "class_42"), "the same for every version and seed"
    assert len({whole.digest, tenth.digest, more.digest}) == 3


@pytest.mark.parametrize(("train", "val"), [(4, 2), (24, 2), (26, 3), (31, 3)])
def test_a_tenth_of_the_training_classes_validates_and_at_least_two(train: int, val: int, tmp_path: Path) -> None:
    data = load("folder", trees.make_folder(tmp_path, classes=2 * train, images=1), val_classes=None)
    assert data.val is not None and (data.val.num_classes, data.train.num_classes) == (val, train - val)


@pytest.mark.parametrize(
    ("classes", "asked", "says", "most"),
    [
        (6, None, "null, which means 2 of 3", "$"),
        (12, 5, "5 of 6", ", or from 2 to 4 "),
        (12, 1, "1 of 6", ", or from 2 to 4 "),
    ],
)
def test_validation_classes_out_of_range(classes: int, asked: int | None, says: str, most: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data.val_classes is {says}.*must be 0{most}"):
        load("folder", trees.make_folder(tmp_path, classes=classes, images=2), val_classes=asked)


def test_digest_follows_paths_labels_and_sizes(tmp_path: Path) -> None:
    first = load("csv", trees.make_csv(tmp_path / "a")).digest
    assert load("csv", trees.make_csv(tmp_path / "b")).digest == first
    made = trees.make_csv(tmp_path / "c")
    made.write_text(made.read_text().replace("0-0.jpg,thing 0", "0-0.jpg,thing 2"))
    grown = trees.make_csv(tmp_path / "d")
    with open(tmp_path / "d" / "pictures" / "0-0.jpg", "ab") as file:
        file.write(b"\0")
    assert len({first, load("csv", made).digest, load("csv", grown).digest}) == 3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"root": None}, "data.root is not given; folder needs the folder of"),
        ({"root": "nowhere"}, "data.root is nowhere, which is not a folder"),
        ({"csv": "a.csv"}, "data.csv is a.csv and data.name is folder"),
        ({"name": "csv", "root": None}, "data.csv is not given"),
        ({"name": "csv", "csv": "a.csv"}, "data.csv is a.csv, which is not a file"),
    ],
)
def test_options_that_do_not_fit(fields: dict[str, str | None], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        load_data(replace(DataConfig(name="folder", root=str(tmp_path)), **fields))


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    trees.make_csv(tmp_path / "data")
    assert len(load_data(DataConfig(name="csv", csv="~/data/list.csv", val_classes=0)).train) == 12
    assert len(load_data(DataConfig(name="csv", csv="~/data/list.csv", root="~/data", val_classes=0)).train) == 12


def test_nothing_is_written_but_the_index(tmp_path: Path) -> None:
    root = trees.make_cub200(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    load("cub200", root)
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if path.name != ".gcahng-cub200.json"} == before


def test_cars196_without_class_names_has_numbers(tmp_path: Path) -> None:
    root = trees.make_cars196(tmp_path, "devkit")
    (root / "devkit" / "cars_meta.mat").unlink()
    assert load("cars196", root).train.class_names == ("001", "006", "047", "098")
