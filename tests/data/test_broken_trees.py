"""Files that differ from the data set: loading stops at the first difference, and the verification lists them all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import trees
from test_data_sets import config_of

from gcahng.data import load_data
from gcahng.data.listing import leaves_folder
from gcahng.data.verify import verify_data
from gcahng.errors import UserError


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def searched(path: Path, shared: str) -> None:
    """Put queries and a gallery in place of the test images, and a training class into one of the two."""
    others = {"query": "gallery", "gallery": "query"}[shared]
    path.write_text(path.read_text().replace(",test", f",{others}"))
    edit(path, "0,train", f"0,{shared}")


def link_out(path: Path, target: Path) -> None:
    path.rename(target)
    path.symlink_to(target)


def _cub(change: Callable[[Path], object]) -> tuple[str, Callable[[Path], Path], Callable[[Path], object]]:
    return "cub200", trees.make_cub200, change


def _sop(change: Callable[[Path], object]) -> tuple[str, Callable[[Path], Path], Callable[[Path], object]]:
    return "sop", trees.make_sop, change


def _inshop(change: Callable[[Path], object]) -> tuple[str, Callable[[Path], Path], Callable[[Path], object]]:
    return "inshop", trees.make_inshop, change


def _folder(change: Callable[[Path], object]) -> tuple[str, Callable[[Path], Path], Callable[[Path], object]]:
    return "folder", trees.make_folder, change


def _csv(change: Callable[[Path], object]) -> tuple[str, Callable[[Path], Path], Callable[[Path], object]]:
    return "csv", trees.make_csv, change


BIRD = "images/001.Some_Bird/Some_Bird_0001_100.jpg"
ITEM = "img/WOMEN/Dresses/id_00000001/00_1_front.jpg"

# How a tree is changed (given its root, or the list for csv), and what loading and the verification say about it.
BROKEN = {
    "missing file": (*_cub(lambda r: (r / BIRD).unlink()), rf"{BIRD} is missing \(listed in images.txt line 1\)"),
    "folder for a file": (*_cub(lambda r: [(r / BIRD).unlink(), (r / BIRD).mkdir()]), rf"{BIRD} is missing \(listed"),
    "missing folder": (
        *_cub(lambda r: (r / "images/001.Some_Bird").rename(r / "elsewhere")),
        "images/001.Some_Bird/: all 4 files listed there are missing, the first in images.txt line 1",
    ),
    "missing list": (*_cub(lambda r: (r / "images.txt").unlink()), "is not the folder of cub200: it has no images.txt"),
    "missing lists": (
        *_sop(lambda r: [path.unlink() for path in r.glob("Ebay*")]),
        "is not the folder of sop: it has no Ebay_train.txt, no Ebay_test.txt",
    ),
    "bad line": (*_cub(lambda r: edit(r / "images.txt", "\n2 ", "\ntwo ")), "images.txt line 2 is 'two 001.Some_Bird"),
    "no path": (*_cub(lambda r: edit(r / "images.txt", "\n3 ", "\n3\n30 ")), "images.txt line 3 is '3'"),
    "bad class": (
        *_cub(lambda r: edit(r / "image_class_labels.txt", "5 2\n", "5 201\n")),
        "image_class_labels.txt line 5 is '5 201'; it must be `image_id class_id` with a class from 1 to 200",
    ),
    "no class": (
        *_cub(lambda r: edit(r / "image_class_labels.txt", "5 2\n", "\n")),
        "images.txt line 5: image 5 has no class in image_class_labels.txt",
    ),
    "image of two classes": (
        *_cub(lambda r: edit(r / "image_class_labels.txt", "5 2\n", "5 2\n5 101\n")),
        "image_class_labels.txt line 6: image 5 was listed before; restore the original",
    ),
    "image of two files": (
        *_cub(lambda r: edit(r / "images.txt", "\n3 ", "\n2 ")),
        "images.txt line 3: image 2 was listed before; restore the original",
    ),
    "not UTF-8": (
        *_cub(lambda r: (r / "images.txt").write_bytes(b"\xff\xfe" + (r / "images.txt").read_bytes())),
        r"images.txt line 1 is .*it must be UTF-8 text",
    ),
    "up and out": (
        *_cub(lambda r: edit(r / "images.txt", "001.Some_Bird/", "../../secret/")),
        "images.txt line 1: 'images/../../secret/.*' leaves the data set's folder; every image must be inside",
    ),
    "absolute": (
        *_cub(lambda r: edit(r / "images.txt", "2 001.Some_Bird/", "2 /etc/001.Some_Bird/")),
        "images.txt line 2: '/etc/001.Some_Bird/.*' leaves the data set's folder",
    ),
    "linked file": (
        *_cub(lambda r: link_out(r / BIRD, r.parent / "out.jpg")),
        f"images.txt line 1: '{BIRD}' is a symbolic link that leads out of the data set's folder",
    ),
    "linked folder": (
        *_cub(lambda r: link_out(r / "images/002.Some_Bird", r.parent / "out")),
        "images.txt line 5: 'images/002.Some_Bird/.*' leads out of the data set's folder through a symbolic link",
    ),
    "linked class folder": (
        *_folder(lambda r: link_out(r / "train/class_0", r.parent / "out")),
        "train/class_0/: 'train/class_0/0.png' leads out of the data set's folder through a symbolic link",
    ),
    "header": (
        *_sop(lambda r: edit(r / "Ebay_test.txt", "image_id ", "")),
        "Ebay_test.txt line 1 is 'class_id super_class_id path'; it must be the header `image_id class_id",
    ),
    "fields": (*_sop(lambda r: edit(r / "Ebay_test.txt", "13 4 1 ", "13 4 ")), "Ebay_test.txt line 2 is '13 4 bicycle"),
    "class in both": (
        *_sop(lambda r: edit(r / "Ebay_test.txt", "13 4 1 ", "13 3 1 ")),
        r"1 of 3 train classes are test classes too, such as 3 \(Ebay_train.txt line 10 and Ebay_test.txt line 2\); "
        "this is an image-level split",
    ),
    "listed twice": (
        *_sop(lambda r: edit(r / "Ebay_test.txt", "_14.JPG", "_13.JPG")),
        "Ebay_test.txt line 3: bicycle_final/.* is listed twice, first in Ebay_test.txt line 2",
    ),
    "wrong count": (
        *_inshop(lambda r: edit(r / "list_eval_partition.txt", "21\n", "22\n")),
        "list_eval_partition.txt line 1 says 22 images and 21 lines follow",
    ),
    "no count": (*_inshop(lambda r: edit(r / "list_eval_partition.txt", "21\n", "")), "line 1 is 'image_name item_id"),
    "status": (
        *_inshop(lambda r: edit(r / "list_eval_partition.txt", " train", " val")),
        f"list_eval_partition.txt line 3 is '{ITEM} .*; it must be .* with a status of train, query, gallery",
    ),
    "shared folders": (
        *_folder(lambda r: trees.make_folder(r, splits=("test",))),
        r"3 of 3 train classes are test classes too, such as class_0 \(train/class_0/ and test/class_0/\)",
    ),
    "no class folder": (
        *_folder(lambda r: trees.write_image(r / "train" / "stray.png")),
        "train/stray.png is not in a class folder; move it to train/CLASS/",
    ),
    "empty class": (*_folder(lambda r: (r / "test" / "new").mkdir()), r"test/new/ has no images \(.jpg"),
    "no test": (*_folder(lambda r: (r / "test").rename(r / "held out")), "it has no test/"),
    "csv header": (*_csv(lambda p: edit(p, "label", "class")), "list.csv line 1 is 'path,class,split'; it must be a"),
    "csv split": (*_csv(lambda p: edit(p, "thing 0,train", "thing 0,tr")), "list.csv line 2 is 'pictures/0-0.jpg,"),
    "csv fields": (*_csv(lambda p: edit(p, "thing 0,train", "thing 0")), "list.csv line 2 has 2 fields; it must"),
    "csv query": (*_csv(lambda p: edit(p, "1,test", "1,query")), "list.csv line 6 has the split query and list.csv li"),
    "csv bytes": (*_csv(lambda p: p.write_bytes(p.read_bytes() + b"\xff,a,train\n")), "list.csv line 26 is .*UTF-8"),
    "csv image level": (*_csv(lambda p: edit(p, "thing 0,train", "thing 0,test")), "1 of 3 train classes are test"),
    "csv train and val": (*_csv(lambda p: edit(p, "0,train", "0,val")), "1 of 3 train classes are val classes too"),
    "csv val and test": (*_csv(lambda p: edit(p, "1,test", "1,val")), "1 of 1 val classes are test classes too"),
    "csv train and query": (*_csv(lambda p: searched(p, "query")), "1 of 3 train .* test classes too, such as thing 0"),
    "csv train and gallery": (*_csv(lambda p: searched(p, "gallery")), "1 of 3 train .* test classes too, such as thi"),
    "csv NUL": (*_csv(lambda p: edit(p, "/0-0", "/0\0-0")), r"'pictures/0\\x00-0.jpg' is missing \(listed in list.csv"),
    "csv no test": (*_csv(lambda p: p.write_text(p.read_text().replace(",test", ",train"))), "has no test images"),
    "csv outside": (*_csv(lambda p: edit(p, "pictures/0-0", "../0-0")), r"list.csv line 2: '\.\./0-0.jpg' leaves"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_load_stops_and_verify_lists(case: str, tmp_path: Path) -> None:
    name, make, change, says = BROKEN[case]
    made = make(tmp_path / "data")
    change(made)
    config = config_of(name, made)
    with pytest.raises(UserError, match=says) as stopped:
        load_data(config)
    assert "\n" not in str(stopped.value)
    option = f"--csv {made}" if name == "csv" else f"--root {made}"
    assert f"`gcahng data verify {name} {option}` lists everything that differs" in str(stopped.value)

    found = verify_data(name, config.root, config.csv, images=False)
    assert found.index is None and not list(tmp_path.rglob(".gcahng*")), "what load refuses is not indexed"
    listed = "\n".join(str(difference) for difference in found.differences)
    assert re.search(says, listed), listed


@pytest.mark.parametrize("content", [b"", b"no MATLAB file", "cut"])
def test_damaged_mat_file(content: bytes | str, tmp_path: Path) -> None:
    path = trees.make_cars196(tmp_path) / "cars_annos.mat"
    path.write_bytes(path.read_bytes()[:1000] if isinstance(content, str) else content)
    with pytest.raises(UserError, match=r"cars_annos.mat cannot be read as a MATLAB file"):
        load_data(config_of("cars196", tmp_path))
    assert len(verify_data("cars196", str(tmp_path)).differences) == 1


def test_bad_annotation_has_its_number(tmp_path: Path) -> None:
    trees.make_cars196(tmp_path, numbers=(1, 98, 99, 200))
    with pytest.raises(
        UserError, match=r"cars_annos.mat annotation 13 has the path 'car_ims/000013.jpg' and the class 200"
    ):
        load_data(config_of("cars196", tmp_path))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b.jpg", False),
        ("a/..b/c...jpg", False),
        ("a/3:4.jpg", False),
        ("/a.jpg", True),
        ("a/../b.jpg", True),
        ("..", True),
        ("a\\..\\b.jpg", True),
        ("\\\\server\\share\\a.jpg", True),
        ("C:\\a.jpg", True),
        ("C:a.jpg", True),
    ],
)
def test_paths_that_leave_on_any_system(path: str, expected: bool) -> None:
    assert leaves_folder(path) == expected


def test_image_level_tree_in_the_place_of_the_original(tmp_path: Path) -> None:
    trees.make_folder(tmp_path, splits=("train",))
    trees.make_folder(tmp_path, splits=("test",))
    found = verify_data("cub200", str(tmp_path))
    assert [difference.what for difference in found.differences][1:] == [
        "6 class folders, such as class_0, are both in train/ and in test/"
    ]


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    root = trees.make_cub200(tmp_path / "data")
    link_out(root / "images" / "002.Some_Bird", root / "moved")
    linked_root = tmp_path / "link"
    linked_root.symlink_to(root)
    assert len(load_data(config_of("cub200", linked_root)).train) == 12
