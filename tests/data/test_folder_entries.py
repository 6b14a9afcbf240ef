"""One rule says what counts in a folder, for class folders and for folders that are embedded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import trees
from test_data_sets import config_of

from gcahng.cli import main
from gcahng.data import load_data
from gcahng.data.folder_entries import HIDDEN, LeftOut
from gcahng.data.verify import verify_data
from gcahng.errors import UserError, UserNote
from gcahng.evaluation.image_inputs import files_images


def class_folder(root: Path) -> tuple[str, ...]:
    """The names of the training images below a class folder, as `folder` lists them."""
    names = load_data(config_of("folder", root)).train.paths
    return tuple(name.removeprefix("train/") for name in names if name.startswith("train/class_0/"))


def embedded(root: Path) -> tuple[str, ...]:
    """The same, as `gcahng embed` lists them."""
    return tuple(name for name in files_images([root / "train"])[1].names if name.startswith("class_0/"))


LISTINGS: list[Callable[[Path], tuple[str, ...]]] = [class_folder, embedded]
FOUR = ("class_0/0.png", "class_0/1.png", "class_0/2.png", "class_0/3.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return trees.make_folder(tmp_path / "data")


def noted(list_names: Callable[[Path], tuple[str, ...]], root: Path) -> tuple[tuple[str, ...], str]:
    """What is listed, and the only note about what is not."""
    with pytest.warns(UserNote) as notes:
        names = list_names(root)
    assert len(notes) == 1
    return names, str(notes[0].message).split(": ", 1)[1].replace("train/", "")


HIDDEN_PATHS = [
    ".ipynb_checkpoints/0-checkpoint.png", "@eaDir/0.png", "@eaDir/0.png/SYNOPHOTO_THUMB_M.png", "__MACOSX/._0.png",
    "._0.png", ".hidden.png", "#recycle/0.png", "$RECYCLE.BIN/0.png", "lost+found/0.png",
]  # fmt: skip


@pytest.mark.parametrize("list_names", LISTINGS)
@pytest.mark.parametrize("place", ["class_0/", ""])
@pytest.mark.parametrize("hidden", HIDDEN_PATHS)
def test_hidden_and_system_names(hidden: str, place: str, list_names: Callable, root: Path) -> None:
    trees.write_image(root / "train" / place / hidden)
    names, note = noted(list_names, root)
    assert names == FOUR
    assert note == f"1 hidden ({place}{hidden.split('/')[0]})"


@pytest.mark.parametrize("list_names", LISTINGS)
def test_files_that_are_no_images_are_not_worth_a_note(list_names: Callable, root: Path) -> None:
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "notes.txt"):
        (root / "train" / "class_0" / name).write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list_names(root) == FOUR


@pytest.mark.parametrize("list_names", LISTINGS)
def test_a_few_of_many_are_named_once(list_names: Callable, root: Path) -> None:
    for i in range(5):
        trees.write_image(root / "train" / "class_0" / f"._{i}.png")
    (root / "train" / "class_0" / "a.heic").write_text("")
    names, note = noted(list_names, root)
    assert names == FOUR
    assert note == (
        "5 hidden (class_0/._0.png, class_0/._1.png, class_0/._2.png, …); 1 of another image format (class_0/a.heic)"
    )


@pytest.mark.parametrize("list_names", LISTINGS)
def test_links_are_followed(list_names: Callable, root: Path) -> None:
    """Files and folders whose links stay in the data set's folder count as what they lead to."""
    trees.write_image(root / "pool" / "more" / "5.png", 0, 5)
    trees.write_image(root / "pool" / "4.png", 0, 4)
    (root / "train" / "class_0" / "4.png").symlink_to(root / "pool" / "4.png")
    (root / "train" / "class_0").rename(root / "pool" / "class_0")
    (root / "train" / "class_0").symlink_to(root / "pool" / "class_0")
    assert list_names(root) == (*FOUR, "class_0/4.png")


@pytest.mark.parametrize("list_names", LISTINGS)
@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_to_a_folder_around_it_is_a_loop(target: str, list_names: Callable, root: Path) -> None:
    (root / "train" / "class_0" / "again").symlink_to(target)
    (root / "train" / "class_0" / "9.png").symlink_to(target)
    names, note = noted(list_names, root)
    assert names == FOUR and note == "2 loops of links (class_0/9.png, class_0/again)"


@pytest.mark.parametrize("list_names", LISTINGS)
def test_links_that_lead_nowhere(list_names: Callable, root: Path) -> None:
    folder = root / "train" / "class_0"
    (folder / "gone").symlink_to("nowhere")
    (folder / "one").symlink_to("other")
    (folder / "other").symlink_to("one")
    names, note = noted(list_names, root)
    assert names == FOUR
    assert note == "3 links that lead nowhere (class_0/gone, class_0/one, class_0/other)"


@pytest.mark.parametrize("list_names", LISTINGS)
def test_pipes_are_not_opened(list_names: Callable, root: Path) -> None:
    os.mkfifo(root / "train" / "class_0" / "9.png")
    names, note = noted(list_names, root)
    assert names == FOUR and note == "1 that is neither a file nor a folder (class_0/9.png)"


@pytest.mark.parametrize("target", ["nowhere.png", "8.png"])
def test_a_dangling_link_named_like_an_image_is_a_missing_image(target: str, root: Path) -> None:
    (root / "train" / "class_0" / "8.png").symlink_to(target)
    with pytest.raises(UserError, match="train/class_0/8.png is missing"):
        class_folder(root)
    assert embedded(root) == (*FOUR, "class_0/8.png"), "reading it says so, or --skip_unreadable leaves it out"


def test_a_folder_that_cannot_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CI runs as root, who may read everything."""
    scandir = os.scandir

    def refuse(folder: Path) -> object:
        if Path(folder).name == "class_0":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    for list_names in LISTINGS:
        with pytest.raises(UserError, match=r"train/class_0 cannot be read: Permission denied; it must be a readable"):
            list_names(root)
    with pytest.warns(UserNote, match=r"left out: 1 folder that cannot be read \(class_0\)"):
        names = files_images([root / "train"], skip_unreadable=True)[1].names
    assert len(names) == 8 and "class_2/0.png" in names


def test_folders_in_class_folders_are_named(root: Path) -> None:
    trees.write_image(root / "train" / "class_0" / "more" / "9.png")
    names, note = noted(class_folder, root)
    assert names == FOUR and note == "1 folder inside a class folder (class_0/more)"
    assert embedded(root) == (*FOUR, "class_0/more/9.png"), "embed takes all folders in a folder"


def test_each_folder_is_embedded_once(root: Path, tmp_path: Path) -> None:
    """Links to each other's folders, and to folders of this tree, make no image come twice, and no search endless."""
    (root / "train" / "a link").symlink_to("class_0")
    outside = tmp_path / "outside"
    for i in range(8):
        trees.write_image(outside / str(i) / "0.png", i)
    for i in range(8):
        for j in range(8):
            if i != j:
                (outside / str(i) / f"to {j}").symlink_to(f"../{j}")
    (root / "train" / "out").symlink_to(outside / "0")
    with pytest.warns(UserNote, match="links? to (a folder that is|folders that are) listed anyway") as notes:
        images, items = files_images([root / "train"])
    assert len(notes) == 1
    real = {os.path.realpath(images.file(i)) for i in range(len(images))}
    assert len(real) == len(items) == 12 + 8 and set(FOUR) < set(items.names)


def test_a_link_to_an_image_of_another_class_or_split(root: Path) -> None:
    (root / "train" / "class_0" / "4.png").symlink_to("0.png")  # of the same class: another image, as it always was
    assert len(load_data(config_of("folder", root)).train) == 13
    (root / "test" / "class_1" / "9.png").symlink_to("../../train/class_0/0.png")
    says = r"test/class_1/: test/class_1/9.png is the same file as train/class_0/0.png \(listed in train/class_0/\)"
    with pytest.raises(UserError, match=says):
        load_data(config_of("folder", root))
    (root / "test" / "class_1" / "9.png").unlink()
    (root / "train" / "class_2 again").symlink_to("class_2")
    found = [difference.what for difference in verify_data("folder", str(root), images=False).differences]
    assert len(found) == 4 and "train/class_2 again/0.png is the same file as train/class_2/0.png" in found[0]


def test_what_was_left_out_is_named_by_verify(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.write_image(root / "train" / "class_0" / "._0.png")
    assert main(["data", "verify", "folder", "--root", str(root), "--no-images"]) == 0
    assert "  left out: 1 hidden (train/class_0/._0.png)\n" in capsys.readouterr().out


def test_a_name_that_would_not_be_seen_is_quoted() -> None:
    left_out = LeftOut()
    left_out.add(HIDDEN, ".a\nb.png")
    left_out.add(HIDDEN, ".c.png ")
    assert str(left_out) == "2 hidden ('.a\\nb.png', '.c.png ')"
