"""CSV files as spreadsheets, pandas and OML write them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
import trees

from gcahng.data import DataSplits, load_data
from gcahng.data.config import DataConfig
from gcahng.data.verify import verify_data
from gcahng.errors import UserError


def write(root: Path, rows: Sequence[str], header: str = "path,label,split", ends: str = "\n") -> Path:
    path = root / "list.csv"
    path.write_bytes(ends.join([header, *rows, ""]).encode())
    return path


def load(path: Path, **fields: object) -> DataSplits:
    return load_data(DataConfig(name="csv", csv=str(path), val_classes=0, **fields))  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images 0.png … 7.png."""
    for i in range(8):
        trees.write_image(tmp_path / f"{i}.png", i)
    return tmp_path


ROWS = [f"{i}.png,{'abcd'[i // 2]},{'train' if i < 4 else 'test'}" for i in range(8)]
UNUSUAL = ["a\u2028b.png", "a\u0085b.png", "a\x0bb.png", "a\x0cb.png", "a\x1cb.png", "a\x1db.png", "a\x1eb.png",
           "a b .png", "a.png ", " a.png", "a\u3000.png", "é,\"'.png", "a\nb.png"]  # fmt: skip


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_names_that_look_like_ends_of_lines_or_fields(name: str, ends: str, root: Path) -> None:
    (root / "0.png").rename(root / name)
    quoted = name.replace('"', '""')
    data = load(write(root, [f'"{quoted}",a,train', *ROWS[1:]], ends=ends))
    assert data.train.paths == (name, "1.png", "2.png", "3.png")


def test_spaces_around_fields_are_no_part_of_them(root: Path) -> None:
    data = load(write(root, [row.replace(",", " , ") for row in ROWS], header=" path , label , split "))
    assert data.train.paths == ("0.png", "1.png", "2.png", "3.png") and data.train.class_names == ("a", "b")


def test_a_row_over_several_lines_has_the_number_of_its_first(root: Path) -> None:
    rows = [ROWS[0], '"1.png","a\nlabel over\nthree lines",train', *ROWS[2:4], "4.png,c,wrong", *ROWS[5:]]
    with pytest.raises(UserError, match="list.csv line 8 is '4.png,c,wrong'"):
        load(write(root, rows))
    rows[4] = ROWS[4]
    with pytest.raises(UserError, match="list.csv line 3 is '1.png,a"):
        load(write(root, [rows[0], rows[1].replace("train", "wrong"), *rows[2:]]))
    assert load(write(root, rows)).train.class_names == ("a", "a\nlabel over\nthree lines", "b")


def test_a_quote_that_is_never_closed(root: Path) -> None:
    with pytest.raises(UserError, match="list.csv line 3 has 2 fields, over several lines; it must have 3") as stopped:
        load(write(root, [ROWS[0], '1.png,"a,train', *ROWS[2:]]))
    assert "\n" not in str(stopped.value)


def test_a_line_that_comes_twice(root: Path) -> None:
    for again in ("0.png,a,train", "./0.png,a,train", ".//0.png,b,test"):
        with pytest.raises(UserError, match="list.csv line 10: 0.png is listed twice, first in list.csv line 2"):
            load(write(root, [*ROWS, again]))


def test_one_image_by_two_names(root: Path) -> None:
    (root / "8.png").symlink_to("0.png")
    says = r"list.csv line 10: 8.png is the same file as 0.png \(listed in list.csv line 2\); an image belongs to one"
    for label, split in (("b", "train"), ("c", "test")):
        with pytest.raises(UserError, match=says):
            load(write(root, [*ROWS, f"8.png,{label},{split}"]))


@pytest.mark.parametrize(
    ("there", "listed", "says"),
    [
        (unicodedata.normalize("NFD", "é.png"), "é.png", r"there is 'e\\u0301.png' in place of '\\xe9.png', which is "
         r"the same text in another Unicode form \(composed or decomposed\)"),
        (unicodedata.normalize("NFD", "é/0.png"), "é/0.png", r"there is 'e\\u0301' in place of '\\xe9', which is the"),
        ("é.png", unicodedata.normalize("NFD", "é.png"), r"there is '\\xe9.png' in place of 'e\\u0301.png', which is"),
        ("A.PNG", "a.png", "there is 'A.PNG' in place of 'a.png', which differs in capital and small letters"),
        ("a.png ", "a.png", "there is 'a.png ' in place of 'a.png', which has other spaces at its ends"),
    ],
)  # fmt: skip
def test_a_near_match_is_named(there: str, listed: str, says: str, root: Path) -> None:
    (root / there).parent.mkdir(exist_ok=True)
    (root / "0.png").rename(root / there)
    with pytest.raises(UserError, match=rf"is missing \(listed in list.csv line 2\); {says}"):
        load(write(root, [f"{listed},a,train", *ROWS[1:]]))
    found = verify_data("csv", None, str(root / "list.csv"), images=False).differences
    assert len(found) == 1 and re.search(says, found[0].what)


def test_a_near_match_of_a_whole_folder(root: Path) -> None:
    trees.write_image(root / unicodedata.normalize("NFD", "Zoé") / "8.png")
    trees.write_image(root / unicodedata.normalize("NFD", "Zoé") / "9.png")
    rows = [*ROWS, *(f"{unicodedata.normalize('NFC', 'Zoé')}/{i}.png,a,train" for i in (8, 9))]
    says = (
        r"Zoé/: all 2 files listed there are missing, the first in list.csv line 10; there is 'Zoe\\u0301' in place of"
    )
    with pytest.raises(UserError, match=says):
        load(write(root, rows))


OML = "label,path,split,is_query,is_gallery"


def oml_rows(*flags: str) -> list[str]:
    """Two training classes, and two validation classes whose images have these flags in turn."""
    train = [f"{i // 2},{i}.png,train,," for i in range(4)]
    return train + [f"{i // 2},{i}.png,validation,{flags[i % len(flags)]}" for i in range(4, 8)]


@pytest.mark.parametrize("flags", ["True,True", "1,1", "1.0,1.0", "true,TRUE"])
def test_oml_images_that_are_searched_among_each_other(flags: str, root: Path) -> None:
    data = load(write(root, oml_rows(flags), OML))
    assert data.train.paths == ("0.png", "1.png", "2.png", "3.png") and data.train.class_names == ("0", "1")
    assert data.test.paths == ("4.png", "5.png", "6.png", "7.png") and data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.gallery is None and data.val is None


@pytest.mark.parametrize("missing", ["", "nan", "None", "False"])
def test_oml_queries_and_gallery_with_further_columns(missing: str, root: Path) -> None:
    """As pandas writes it: an index column, categories, and boxes where there are none."""
    rows = [row.replace("train,,", f"train,{missing},{missing}") for row in oml_rows("True,False", "False,True")]
    rows = [f"{i},{row},dresses,,,," for i, row in enumerate(rows)]
    data = load(write(root, rows, f",{OML},category,x_1,x_2,y_1,y_2"))
    assert data.gallery is not None
    assert data.test.paths == ("4.png", "6.png") and data.gallery.paths == ("5.png", "7.png")
    assert data.test.class_names == data.gallery.class_names == ("2", "3")


def test_oml_whole_paths(root: Path) -> None:
    rows = [re.sub(r",(\d.png)", rf",{root}/\1", row) for row in oml_rows("1,1")]
    assert load(write(root, rows, OML)).train.paths == ("0.png", "1.png", "2.png", "3.png")
    with pytest.raises(UserError, match="leaves the data set's folder"):
        load(root / "list.csv", root=str(trees.make_folder(root / "other")))


@pytest.mark.parametrize(
    ("rows", "header", "says"),
    [
        (oml_rows("1,1"), "label,path,split,is_query,is_galery", "line 1 is .*both is_query and is_gallery"),
        (oml_rows("1,1", "0,1"), OML, "list.csv line 6 is a query and in the gallery, and list.csv line 7 only one"),
        (oml_rows("0,0"), OML, "list.csv line 6 has is_query and is_gallery false; a validation image must be one"),
        (oml_rows(",1"), OML, "list.csv line 6 has is_query '' and is_gallery '1'; each must be True or False"),
        (["0,0.png,train,1,"], OML, "list.csv line 2 has is_query '1' and is_gallery '' and the split train"),
        (["0,0.png,test,1,1"], OML, "list.csv line 2 has the split 'test'; beside is_query and is_gallery it must be"),
        ([r + ",1,9,1,9" for r in oml_rows("1,1")], OML + ",x_1,x_2,y_1,y_2", r"line 2 has a bounding box \(x_1, x_2"),
        ([r + ",4" for r in oml_rows("1,1")], OML + ",sequence", "line 6 has a sequence, .* this is not supported"),
        (["0.png,0,validation"], "path,label,split", "validation needs the columns is_query and is_gallery"),
    ],
)
def test_what_oml_has_and_is_not_supported(rows: list[str], header: str, says: str, root: Path) -> None:
    path = write(root, rows, header)
    with pytest.raises(UserError, match=says) as stopped:
        load(path)
    assert "\n" not in str(stopped.value)
    found = verify_data("csv", None, str(path), images=False).differences
    assert sum(bool(re.search(says, str(difference))) for difference in found) in (1, 4), "boxes are one difference"
