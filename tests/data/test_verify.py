"""`gcahng data verify`: one list of all differences, each with its remedy, and an exit status."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import trees

from gcahng.cli import main
from gcahng.data import DATA_SETS
from gcahng.data.spec import Counts
from gcahng.data.verify import verify_data


@pytest.fixture
def small_cub(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUB-200-2011 as `make_cub200` makes it by default is complete."""
    expected = {"train": Counts(12, 3), "test": Counts(12, 3)}
    monkeypatch.setitem(DATA_SETS, "cub200", replace(DATA_SETS["cub200"], expected=expected))


@pytest.fixture(scope="module")
def whole_cub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many images and classes as CUB-200-2011 has, all of them one file."""
    root = tmp_path_factory.mktemp("CUB_200_2011")
    trees.write_image(root / "one.jpg")
    listed, labeled = [], []
    for first, images in ((1, 5864), (101, 5924)):
        for i in range(images):
            number = first + i % 100
            name = f"{number:03}.Bird/{len(listed)}.jpg"
            if i < 100:
                (root / "images" / f"{number:03}.Bird").mkdir(parents=True)
            os.link(root / "one.jpg", root / "images" / name)
            listed.append(f"{len(listed) + 1} {name}\n")
            labeled.append(f"{len(labeled) + 1} {number}\n")
    (root / "images.txt").write_text("".join(listed))
    (root / "image_class_labels.txt").write_text("".join(labeled))
    return root


def test_whole_cub200_has_no_difference(whole_cub: Path) -> None:
    found = verify_data("cub200", str(whole_cub), images=False)
    assert found.differences == [] and found.index is not None
    assert found.counts == {"train": Counts(5864, 100), "test": Counts(5924, 100)}


def test_one_image_too_few_is_a_difference(whole_cub: Path) -> None:
    images = whole_cub / "images.txt"
    text = images.read_text()
    try:
        images.write_text(text.rsplit("\n", 2)[0] + "\n")
        told = [str(difference) for difference in verify_data("cub200", str(whole_cub), images=False).differences]
    finally:
        images.write_text(text)
    assert told == [
        f"image_class_labels.txt: image 11788 is not in images.txt; restore the original {images}",
        "test has 5,923 images; CUB-200-2011 has 5,924; unpack the original archive again",
    ]


def test_every_difference_is_in_one_list(tmp_path: Path, small_cub: None, capsys: pytest.CaptureFixture[str]) -> None:
    root = trees.make_cub200(tmp_path)
    birds = [f"images/001.Some_Bird/Some_Bird_000{i}_10{i - 1}.jpg" for i in (1, 2, 3)]
    (root / birds[0]).unlink()
    (root / birds[1]).write_bytes((root / birds[1]).read_bytes()[:400])
    (root / birds[2]).write_bytes(b"")
    lists = root / "images.txt"
    lists.write_text(lists.read_text().replace("\n5 ", "\nfive ").replace("6 002.Some_Bird/", "6 ../../elsewhere/"))
    assert main(["data", "verify", "cub200", "--root", str(root)]) == 1
    out = capsys.readouterr().out
    assert "7 differences:" in out and "index not written" in out
    for number, told in enumerate(
        (
            "images.txt line 5 is 'five 002.Some_Bird/",
            "images.txt line 6: 'images/../../elsewhere/",
            "image_class_labels.txt: image 5 is not in images.txt",
            f"{birds[0]} is missing (listed in images.txt line 1)",
            "train has 9 images; CUB-200-2011 has 12",
            f"{birds[1]} cannot be read as an image: ",
            f"{birds[2]} cannot be read as an image: ",
        ),
        start=1,
    ):
        assert told in out, number
    assert out.count("\n     -> ") == 7, "each has its remedy"
    for section in ("expected files:", "where to get them:", "image-level splits:"):
        assert section in out
    assert "train_test_split.txt has all 200 classes on both sides" in out


def test_unreadable_images_alone(tmp_path: Path, small_cub: None, capsys: pytest.CaptureFixture[str]) -> None:
    root = trees.make_cub200(tmp_path)
    bird = root / "images/001.Some_Bird/Some_Bird_0001_100.jpg"
    bird.write_bytes(bird.read_bytes()[:400])
    assert main(["data", "verify", "cub200", "--root", str(root)]) == 1
    out = capsys.readouterr().out
    assert "1 difference:" in out and "24 images decoded" in out
    assert f"index {root / '.gcahng-cub200.json'}" in out, "training can start, with data.skip_unreadable"
    assert main(["data", "verify", "cub200", "--root", str(root), "--no-images"]) == 0
    assert "no differences" in capsys.readouterr().out


def test_a_clean_tree_has_status_0(tmp_path: Path, small_cub: None, capsys: pytest.CaptureFixture[str]) -> None:
    root = trees.make_cub200(tmp_path)
    assert main(["data", "verify", "cub200", "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert "no differences" in out and "24 images decoded" in out and "expected files" not in out


def test_csv_without_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", "csv", "--csv", str(trees.make_csv(tmp_path))]) == 0
    assert "any" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cars196", "sop", "inshop"])
def test_partial_trees_differ_in_their_counts(name: str, tmp_path: Path) -> None:
    getattr(trees, f"make_{name}")(tmp_path)
    found = verify_data(name, str(tmp_path), images=False)
    whats = {difference.what.split(" has ")[0] for difference in found.differences}
    assert whats == set(DATA_SETS[name].expected) and len(found.differences) == 2 * len(whats)


def test_progress_reaches_all_images(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify_data("folder", str(trees.make_folder(tmp_path)), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 24), (24, 24)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data", "verify", "imagenet"], "argument NAME: invalid choice: 'imagenet'"),
        (["data", "verify", "sop"], "data.root is not given; sop needs the folder of"),
        (["data", "verify", "sop", "--root", "nowhere"], "data.root is nowhere, which is not a folder"),
        (["data", "verify", "csv"], "data.csv is not given"),
        (["data"], "{verify,list}"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_sizes_are_those_of_the_papers() -> None:
    """Images and classes: CUB-200-2011 and Cars196 split at half of the classes, the others by their own lists."""
    assert {name: dict(spec.expected) for name, spec in DATA_SETS.items() if spec.expected} == {
        "cub200": {"train": (5864, 100), "test": (5924, 100)},
        "cars196": {"train": (8054, 98), "test": (8131, 98)},
        "sop": {"train": (59551, 11318), "test": (60502, 11316)},
        "inshop": {"train": (25882, 3997), "test": (14218, 3985), "gallery": (12612, 3985)},
    }


def test_list_has_every_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    for spec in DATA_SETS.values():
        assert spec.name in out and spec.title in out
        for counts in spec.expected.values():
            assert f"{counts.images:,}" in out and f"{counts.classes:,}" in out
