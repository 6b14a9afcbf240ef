"""The script that makes a data set of emoji, on packages with a few drawings of our own."""

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "make_emoji.py"
spec = importlib.util.spec_from_file_location("make_emoji", SCRIPT)
make_emoji = importlib.util.module_from_spec(spec)
sys.modules["make_emoji"] = make_emoji
spec.loader.exec_module(make_emoji)

FIVE = tuple("abcde")


def package(
    file: Path, icons: dict[str, str], chars: dict[str, str] | None = None, aliases: dict | None = None
) -> Path:
    """Writes a package of drawings as npm packs it."""
    parts = {
        "icons.json": {"icons": {n: {"body": b} for n, b in icons.items()}, "aliases": aliases or {}, "width": 8},
        "info.json": {"license": {"title": "T", "url": "U"}, "author": {"name": "N", "url": "W"}},
    }
    if chars is not None:
        parts["chars.json"] = chars
    with tarfile.open(file, "w:gz") as archive:
        for name, content in parts.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file


def drawings(svgs: dict[str, str], chars: dict[str, str]):
    return make_emoji.Drawings(svgs, chars, "", "")


def test_a_package_is_read_with_its_aliases(tmp_path):
    aliases = {"smile": {"parent": "face"}, "mirrored": {"parent": "face", "hFlip": True}, "lost": {"parent": "none"}}
    read = make_emoji.read_drawings(package(tmp_path / "p.tgz", {"face": "<g/>"}, {"1f600": "face"}, aliases))
    assert set(read.svgs) == {"face", "smile"}  # a mirrored drawing is another one
    assert '<svg xmlns="http://www.w3.org/2000/svg"' in read.svgs["face"] and 'viewBox="0 0 8 16"' in read.svgs["face"]
    assert (read.chars, read.license, read.source) == ({"1f600": "face"}, "T (U)", "N, W")


def test_a_class_is_a_code_point_that_five_vendors_draw():
    chars = {"1f431": "cat", "2600-fe0f": "sun", "1f431-200d-1f431": "two-cats", "1f3fb": "tone", "1f436": "dog"}
    svgs = dict.fromkeys(chars.values(), "")
    vendors = {v: drawings(svgs if v != "e" else {k: "" for k in svgs if k != "dog"}, chars) for v in FIVE}
    classes = make_emoji.find_classes(vendors)
    assert set(classes) == {0x1F431, 0x2600}  # no sequence, no skin tone, no class with four pictures
    assert classes[0x2600] == dict.fromkeys(FIVE, "sun")


def test_names_say_what_is_drawn_only_where_they_have_one_meaning():
    named = {v: drawings({"cat": "", "x": ""}, {"1f431": "cat", "1f436": "x"}) for v in "abcd"}
    named["d"] = drawings({"cat": "", "x": ""}, {"1f431": "cat", "1f437": "x"})
    named["e"] = drawings({"catface": "", "x": ""}, {})  # CAT FACE is U+1F431 in Unicode, too
    assert make_emoji.find_classes(named)[0x1F431]["e"] == "catface"
    assert set(make_emoji.find_classes(named)) == {0x1F431}


def test_pictures_that_a_vendor_has_for_two_classes_are_left_out():
    classes = {1: {v: "one" for v in (*FIVE, "f")}, 2: {v: "two" for v in FIVE}}
    pictures = {(v, n): f"{v} {n}".encode() for v in (*FIVE, "f") for n in ("one", "two")}
    pictures["a", "two"] = pictures["a", "one"]
    assert make_emoji.distinct(classes, pictures) == {1: {v: "one" for v in (*FIVE[1:], "f")}}


def test_a_drawing_becomes_a_square_picture_on_white():
    wide = make_emoji.svg_of({}, {"body": '<path fill="currentColor" d="M0 0h8v4H0z"/>', "width": 16, "height": 4})
    picture = Image.open(io.BytesIO(make_emoji.render_one(wide)))
    assert (picture.size, picture.mode) == ((96, 96), "RGB")
    white, black = (255, 255, 255), (0, 0, 0)
    assert [picture.getpixel(at) for at in ((2, 48), (45, 48), (60, 48), (2, 2))] == [black, black, white, white]


def test_a_folder_is_made_and_is_never_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_emoji, "VERSIONS", dict.fromkeys(FIVE, "1"))
    monkeypatch.setattr(make_emoji, "render", lambda drawings, classes, processes: {
        (v, n): f"{v} {n}".encode() for names in classes.values() for v, n in names.items()
    })  # fmt: skip
    for vendor in FIVE:
        package(tmp_path / f"iconify-json-{vendor}-1.tgz", {"cat": "", "dog": ""}, {"1f431": "cat", "1f436": "dog"})
    make_emoji.main([str(tmp_path / "out"), "--packages", str(tmp_path)])
    assert "1 training classes, 1 test classes, 10 pictures" in capsys.readouterr().out
    train, test = ({p.parent.name for p in (tmp_path / "out").glob(f"{split}/*/*.png")} for split in ("train", "test"))
    assert train | test == {"1f431_cat_face", "1f436_dog_face"} and not train & test
    assert (tmp_path / "out" / "LICENSES.txt").read_text().count("T (U)") == 5
    with pytest.raises(SystemExit, match="out is there already; out must be a new folder"):
        make_emoji.main([str(tmp_path / "out"), "--packages", str(tmp_path)])


@pytest.mark.parametrize("npm", ["absent", "fails"])
def test_a_package_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, npm):
    (tmp_path / "bin").mkdir()
    if npm == "fails":
        (tmp_path / "bin" / "npm").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(SystemExit, match="npm could not download|npm is not installed"):
        make_emoji.package_file("noto", tmp_path / "packages")
