"""Lists of image files, and whether files that a user names are rotated as their EXIF orientation says."""

from __future__ import annotations

import os
import sys
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gcahng.cli import main
from gcahng.data.config import DataConfig
from gcahng.errors import UserError, UserNote
from gcahng.evaluation.image_inputs import files_images, rotates_files, with_data
from gcahng.retrieval.embeddings import read_embeddings
from gcahng.retrieval.index_file import load
from gcahng.retrieval.items import EmbeddingModel, model_from

SIZE = ["--data.resize", "32", "--data.image_size", "32", "--data.workers", "0", "--device", "cpu"]
UNUSUAL = ("a\u2028b.png", "a\u2029b.png", "a\x85b.png", "a\x0bb.png", "a\x0cb.png", "a\x1cb.png", "a\x1db.png",
           "a\x1eb.png", "a.png ", " a.png", "é.png", "a\tb.png")  # fmt: skip


def picture(path: Path, orientation: int = 1) -> None:
    """An image whose left half is white as it is stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16] = 255
    Image.fromarray(pixels).save(path, "PNG", exif=exif)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_only_ends_of_lines_split_a_list(start: str, ends: str, tmp_path: Path) -> None:
    for name in UNUSUAL:
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_bytes((start + ends.join([*UNUSUAL, "", "  ", ""])).encode())
    assert files_images([tmp_path / "list.txt"])[1].names == UNUSUAL


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = b"\xff\xfe.png"
    Path(tmp_path, name.decode("utf-8", "surrogateescape")).touch()
    (tmp_path / "list.lst").write_bytes(b"./" + name + b"\n")
    assert files_images([tmp_path / "list.lst"])[1].names == (name.decode("utf-8", "surrogateescape"),)


@pytest.mark.parametrize(
    ("there", "listed", "says"),
    [
        ("b.png", "a.png", "/a.png does not exist; correct the list, or leave out what cannot be read with --skip"),
        ("A.png", "a.png", "a.png does not exist, but there is 'A.png' in place of 'a.png', which differs in capital"),
        (
            "a.png",
            "a.png ",
            r"a.png ' does not exist, but there is 'a.png' in place of 'a.png ', which has other spaces",
        ),
        (
            unicodedata.normalize("NFD", "é.png"),
            "é.png",
            r"there is 'e\\u0301.png' in place of '\\xe9.png', which is the",
        ),
        ("d.png", "d.png/", "d.png' does not exist|d.png does not exist"),
        ("a.png", "a\0.png", r"'.*a\\x00.png' does not exist"),
    ],
)
def test_a_missing_image_of_a_list_is_named_at_once(there: str, listed: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "0.png").touch()
    if there == "d.png":
        (tmp_path / there).mkdir()
    else:
        (tmp_path / there).touch()
    path = tmp_path / "list.txt"
    path.write_bytes(f"0.png\n\n{listed}\n".encode())
    with pytest.raises(UserError, match=f"list.txt line 3: .*{says}"):
        files_images([path])
    if "\0" not in listed:
        assert len(files_images([path], skip_unreadable=True)[0]) == 2, "it is left out when images are read"


def test_near_matches_of_what_the_command_line_names(tmp_path: Path) -> None:
    (tmp_path / "Photos").mkdir()
    (tmp_path / "Photos" / "a.png").touch()
    for given in (tmp_path / "photos", tmp_path / "photos" / "a.png"):
        with pytest.raises(
            UserError, match="does not exist, but there is 'Photos' in place of 'photos', which differs"
        ):
            files_images([given])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_list_of_windows_powershell(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("\ufeffa.png\r\n".encode(encoding))
    with pytest.raises(UserError, match="list.txt is text in UTF-16; it must be UTF-8"):
        files_images([tmp_path / "list.txt"])


def test_images_that_are_named_twice_are_said_once_and_stay(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "c.png").symlink_to("a.png")
    (tmp_path / "list.txt").write_text("a.png\nb.png\n./a.png\nc.png\n")
    with pytest.warns(UserNote, match=r"^1 of 2 images are named more than once, such as .*/a.png; each of") as notes:
        names = files_images([tmp_path / "list.txt"])[1].names
    assert len(notes) == 1 and names == ("a.png", "b.png", "a.png", "c.png")


def test_a_note_is_one_line_of_the_command(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(message: Warning, category: type[Warning], *where: object) -> None:  # pytest keeps warnings to itself
        print(warnings.formatwarning(message, category, "code.py", 1), end="", file=sys.stderr)

    monkeypatch.setattr(warnings, "showwarning", show)
    picture(tmp_path / "photos" / "a.png")
    picture(tmp_path / "photos" / "@eaDir" / "a.png")
    assert main(["embed", run, str(tmp_path / "photos"), "--out", str(tmp_path / "x.npy"), *SIZE]) == 0
    assert capsys.readouterr().err.splitlines()[0] == "gcahng: note: left out: 1 hidden (@eaDir)"
    warnings.warn("of another program", UserWarning, stacklevel=1)
    warnings.warn("outside of a command", UserNote, stacklevel=1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "code.py:1: UserWarning: of another program"
    assert "code.py:1: UserNote: outside of a command" in lines


def test_a_folder_of_nothing_but_what_does_not_count(tmp_path: Path) -> None:
    picture(tmp_path / ".a.png")
    with pytest.raises(UserError, match=r"holds no images; it must hold .*; left out: 1 hidden \(.a.png\)"):
        files_images([tmp_path])


def test_which_files_are_rotated() -> None:
    for name, recorded, rotated in (
        ("glyphs", None, True),
        ("cub200", False, True),  # of the published set, which says nothing about a user's photographs
        ("folder", True, True),
        ("folder", False, False),  # as the network was trained, also by a version without the option
        ("csv", False, False),
    ):
        config = DataConfig(name=name, exif_rotate=recorded)  # type: ignore[arg-type]
        assert rotates_files(config) == rotated
        assert rotates_files(config, True) and not rotates_files(config, False)
    trained = DataConfig(name="folder", exif_rotate=False)
    assert not with_data(trained, {"root": "elsewhere"}).rotates
    assert with_data(trained, {"name": "csv"}).rotates and not with_data(trained, {"name": "sop"}).rotates


def test_embeddings_know_whether_images_were_rotated() -> None:
    stored = EmbeddingModel("a" * 64, "glyph_conv", "run", 32, 32)
    rotated, no_files = replace(stored, exif_rotate=True), replace(stored, exif_rotate=None)
    assert "rotated as their EXIF orientation says for one" in str(stored.difference(rotated))
    assert stored.difference(no_files) is rotated.difference(no_files) is stored.difference(stored) is None
    old = {name: value for name, value in vars(rotated).items() if name != "exif_rotate"}
    assert model_from(old) == stored, "a file of before was made without rotation"


def test_a_search_with_the_other_setting_is_refused(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A turned copy of an upright image is its equal where EXIF counts, and not where it does not."""
    picture(tmp_path / "upright" / "a.png")
    turned = tmp_path / "turned" / "a.png"
    picture(turned, 3)
    pixels = np.asarray(Image.open(turned))[::-1, ::-1]
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.ascontiguousarray(pixels)).save(turned, exif=exif)

    def similarity(index: Path, *options: str) -> float:
        assert main(["search", str(index), str(turned), *options, *SIZE]) == 0
        return float(capsys.readouterr().out.splitlines()[2].split()[1])

    found = {}
    for setting in ("true", "false"):
        index = tmp_path / f"{setting}.index"
        build = ["index", "build", str(tmp_path / "upright"), "--model", run, "--out", str(index)]
        assert main([*build, "--data.exif_rotate", setting, *SIZE]) == 0
        assert load(index).model.exif_rotate == (setting == "true")  # type: ignore[union-attr]
        capsys.readouterr()
        found[setting] = similarity(index)  # as the index, unless the user says otherwise
        assert found[setting] == similarity(index, "--data.exif_rotate", setting)
        other = {"true": "false", "false": "true"}[setting]
        assert main(["search", str(index), str(turned), "--data.exif_rotate", other, *SIZE]) == 2
        assert "does not fit the index: images were rotated as their EXIF orientation says for one" in (
            capsys.readouterr().err
        )
        main(["index", "info", str(index)])
        assert ("images      rotated by EXIF, resized" in capsys.readouterr().out) == (setting == "true")
    assert found["true"] == 1.0 > found["false"]


def test_a_file_of_embeddings_with_the_other_setting_is_not_gone_on_with(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "photos" / "a.png", 6)
    out = tmp_path / "x.safetensors"
    embed = ["embed", run, str(tmp_path / "photos"), "--out", str(out), *SIZE]
    assert main(embed) == 0 and read_embeddings(out).model.exif_rotate is True  # type: ignore[union-attr]
    assert main(embed) == 0, "the same again"
    assert main([*embed, "--data.exif_rotate", "false"]) == 2
    assert "was made from other images, another network or other options" in capsys.readouterr().err
    assert main([*embed, "--data.exif_rotate", "yes"]) == 2
    assert "'yes' is neither true nor false" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.jpg", "x.txt"])
def test_a_named_pipe_is_named(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} cannot be read: it is a named pipe, not a regular file; it must be"):
        files_images([tmp_path / name])


@pytest.mark.parametrize("command", ["embed {run} --out {out}.npy", "index build --model {run} --out {out}.index"])
def test_a_device_is_looked_for_before_images(
    command: str, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed: list[object] = []
    monkeypatch.setattr("gcahng.commands.image_options.load_images", lambda *arguments: listed.append(arguments))
    words = command.format(run=run, out=tmp_path / "x").split()
    assert main([*words, "--device", "cuda:999"]) == 2 and not listed
    assert "device is 'cuda:999'; PyTorch finds" in capsys.readouterr().err
