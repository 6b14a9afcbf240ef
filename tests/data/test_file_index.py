"""The index makes the next start instant, and is not used if it is stale or damaged."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import trees
from test_data_sets import MAKERS, config_of

import gcahng.data.load
from gcahng.data import load_data
from gcahng.data.verify import verify_data
from gcahng.errors import UserError, UserNote

INDEX = ".gcahng-cub200.json"


@pytest.fixture
def no_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("looked at every file")

    monkeypatch.setattr(gcahng.data.load, "collect", refuse)


@pytest.mark.parametrize("tree", MAKERS)
def test_next_start_looks_at_no_image(tree: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    name, make = MAKERS[tree]
    config = config_of(name, make(tmp_path))
    first = load_data(config)
    request.getfixturevalue("no_collecting")
    again = load_data(config)
    for split in ("train", "test", "gallery"):
        one, other = getattr(first, split), getattr(again, split)
        if one is not None:
            assert (one.root, one.paths, one.class_names) == (other.root, other.paths, other.class_names)
            assert one.labels.tolist() == other.labels.tolist()
    assert first.digest == again.digest


def test_verify_writes_it(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = trees.make_cub200(tmp_path)
    assert verify_data("cub200", str(root)).index == root / INDEX
    assert not list(root.glob("*.tmp"))
    request.getfixturevalue("no_collecting")
    load_data(config_of("cub200", root))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_named_pipe_in_the_place_of_the_index_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Path) -> bytes:
        assert path.is_file(), "it would wait for a writer"
        return real(path)

    real = Path.read_bytes
    root = trees.make_cub200(tmp_path)
    os.mkfifo(root / INDEX)
    monkeypatch.setattr(Path, "read_bytes", opened)
    assert len(load_data(config_of("cub200", root)).train) == 12


@pytest.mark.parametrize("damage", [b"", b"{}", b"half", b"one label", b"\xff\xfe\0"])
def test_damaged_index_is_made_anew(damage: bytes, tmp_path: Path) -> None:
    root = trees.make_cub200(tmp_path)
    first = load_data(config_of("cub200", root))
    good = (root / INDEX).read_bytes()
    damaged = {b"half": good[: len(good) // 2], b"one label": good.replace(b'"labels": [0', b'"labels": [1', 1)}
    assert good not in damaged.values()
    (root / INDEX).write_bytes(damaged.get(damage, damage))
    with pytest.warns(UserNote, match=f"{INDEX} is damaged; the files are listed anew"):
        assert load_data(config_of("cub200", root)).digest == first.digest
    assert (root / INDEX).read_bytes() == good


def test_changed_label_file_makes_it_stale(tmp_path: Path) -> None:
    root = trees.make_cub200(tmp_path)
    first = load_data(config_of("cub200", root))
    labels = root / "image_class_labels.txt"
    labels.write_text(labels.read_text().replace("1 1\n", "1 2\n", 1))
    assert load_data(config_of("cub200", root)).digest != first.digest


@pytest.mark.parametrize("change", ["new", "gone", "renamed"])
def test_changed_folder_makes_it_stale(change: str, tmp_path: Path) -> None:
    root = trees.make_folder(tmp_path)
    first = load_data(config_of("folder", root))
    image = root / "train" / "class_0" / "0.png"
    if change == "new":
        trees.write_image(image.with_name("9.png"))
    elif change == "gone":
        image.unlink()
    else:
        image.rename(image.with_name("9.png"))
    assert load_data(config_of("folder", root)).train.paths != first.train.paths


WRONG = {
    "paths": ("a.jpg", [1], [None], [[]], {}, None, []),
    "labels": ([], [-1], [10**30], [0.5], ["0"], [True], None, 3),
    "class_names": ([], ["one"], [1, 2, 3], "abc", None),
    "sizes": ([], [-1], ["1"], [None], 7),
}


@pytest.mark.parametrize("field", [*WRONG, "split"])
def test_an_index_with_other_values_under_a_right_checksum(field: str, tmp_path: Path) -> None:
    root = trees.make_cub200(tmp_path)
    first = load_data(config_of("cub200", root))
    good = (root / INDEX).read_bytes()
    for wrong in WRONG.get(field, ("train", "test")):
        values = json.loads(good.split(b"\n", 1)[1])
        if field == "split":
            del values["splits"][wrong]
        else:  # a list with one wrong value stands for a column that has it once
            column = values["splits"]["train"][field]
            whole = isinstance(wrong, list) and len(wrong) == 1 and field != "class_names"
            values["splits"]["train"][field] = [*wrong, *column[1:]] if whole else wrong
        body = json.dumps(values).encode()
        (root / INDEX).write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        with pytest.warns(UserNote, match="is damaged"):
            assert load_data(config_of("cub200", root)).digest == first.digest
        assert (root / INDEX).read_bytes() == good


@pytest.mark.parametrize("change", ["leads out", "of another schema"])
def test_index_that_is_not_believed_though_its_checksum_is_right(change: str, tmp_path: Path) -> None:
    root = trees.make_cub200(tmp_path)
    first = load_data(config_of("cub200", root))
    values = json.loads((root / INDEX).read_bytes().split(b"\n", 1)[1])
    values["splits"]["train"]["paths"][0] = "../../etc/passwd" if change == "leads out" else "images/other.jpg"
    values["schema"] += change == "of another schema"
    body = json.dumps(values).encode()
    (root / INDEX).write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    assert load_data(config_of("cub200", root)).train.paths == first.train.paths


def test_folder_that_cannot_be_written_has_its_index_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    root = trees.make_cub200(tmp_path / "data")
    (root / INDEX).mkdir()  # nothing can be renamed to it, not even by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = verify_data("cub200", str(root))
    assert found.index is not None and found.index.parent == tmp_path / "cache" / "gcahng"
    assert not list(root.glob("*.tmp"))
    request.getfixturevalue("no_collecting")
    load_data(config_of("cub200", root))


def test_no_place_for_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = trees.make_cub200(tmp_path / "data")
    (root / INDEX).mkdir()
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(load_data(config_of("cub200", root)).train) == 12
    assert verify_data("cub200", str(root)).index is None


def test_lost_image_is_found_by_verify_though_there_is_an_index(tmp_path: Path) -> None:
    root = trees.make_cub200(tmp_path)
    data = load_data(config_of("cub200", root))
    data.train.file(0).unlink()
    lost = verify_data("cub200", str(root), images=False).differences[0].what
    assert lost == f"{data.train.paths[0]} is missing (listed in images.txt line 1)"
    (root / INDEX).unlink()
    with pytest.raises(UserError, match="is missing"):
        load_data(config_of("cub200", root))
