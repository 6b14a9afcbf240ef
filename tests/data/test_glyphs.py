"""The glyphs data set: what its classes are, how they are split, and that drawing repeats."""

from __future__ import annotations

import sys
import unicodedata

import numpy as np
import pytest
import torch

from gcahng.data import glyphs, load_glyphs
from gcahng.data.glyphs import FACES, lookalikes
from gcahng.data.image_set import DataSplits
from gcahng.errors import UserError


@pytest.fixture(scope="module")
def splits() -> DataSplits:
    return load_glyphs()


@pytest.fixture(scope="module")
def drawn() -> tuple[list[int], np.ndarray]:
    return glyphs._drawn_once()  # as load_glyphs has them


def test_classes_are_characters_of_all_twelve_faces(drawn: tuple[list[int], np.ndarray]) -> None:
    codes, images = drawn
    assert len(FACES) == len(set(FACES)) == 12
    assert not any("Display" in face for face in FACES)
    assert 2100 <= len(codes) <= 2200
    assert codes == sorted(set(codes))
    assert {unicodedata.category(chr(code))[0] for code in codes} == set("LNSP")
    assert images.shape == (len(codes), 12, 32, 32) and images.dtype == np.uint8


def test_drawings_are_not_empty_and_distinct_in_dejavu_sans(drawn: tuple[list[int], np.ndarray]) -> None:
    codes, images = drawn
    assert (images.reshape(len(codes), 12, -1).max(axis=2) > 100).all()
    assert len(np.unique(images[:, 0].reshape(len(codes), -1), axis=0)) == len(codes)


@pytest.mark.parametrize(
    ("kept", "left_out"),
    [
        ("A", "\u0391\u0410"),  # Latin, Greek and Cyrillic capital A
        ("\u00cf", "\u03aa\u0407"),  # the same contours in another order
        ("\u258c", "\u2590"),  # the left and the right half block differ only along the line
    ],
)
def test_of_equal_drawings_the_lowest_code_point_stays(
    drawn: tuple[list[int], np.ndarray], kept: str, left_out: str
) -> None:
    codes = set(drawn[0])
    assert ord(kept) in codes
    assert not codes & {ord(character) for character in left_out}


def test_height_on_the_line_tells_characters_apart(drawn: tuple[list[int], np.ndarray]) -> None:
    codes, images = drawn
    superscript, subscript = images[codes.index(0x2070), 0], images[codes.index(0x2080), 0]
    assert np.flatnonzero(superscript.any(axis=1)).max() < np.flatnonzero(subscript.any(axis=1)).max() - 5


def test_ink_is_centered_along_the_line(drawn: tuple[list[int], np.ndarray]) -> None:
    images = drawn[1].reshape(-1, 32, 32)
    columns = images.any(axis=1)
    left, right = columns.argmax(axis=1), 31 - columns[:, ::-1].argmax(axis=1)
    assert (np.abs(left + right - 31) <= 1).all()


def test_the_split_halves_the_classes_and_nothing_overlaps(
    splits: DataSplits, drawn: tuple[list[int], np.ndarray]
) -> None:
    names = [set(part.class_names) for part in (splits.train, splits.val, splits.test)]
    assert [len(part) for part in names] == [200, 100, len(drawn[0]) // 2]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    for part in (splits.train, splits.val, splits.test):
        assert part.images.shape == (12 * part.num_classes, 32, 32) and part.images.dtype == torch.uint8
        assert torch.equal(part.labels.bincount(), torch.full((part.num_classes,), 12))


def test_labels_name_what_the_images_show(splits: DataSplits, drawn: tuple[list[int], np.ndarray]) -> None:
    codes, images = drawn
    for label in (0, 7, splits.test.num_classes - 1):
        place = codes.index(int(splits.test.class_names[label].split()[0].removeprefix("U+"), 16))
        assert np.array_equal(splits.test.images[splits.test.labels == label].numpy(), images[place])


def test_drawing_and_split_repeat_and_ignore_the_seed_of_training(splits: DataSplits) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    glyphs._drawn_once.cache_clear()
    again = load_glyphs()
    assert again.digest == splits.digest
    assert again.test.class_names == splits.test.class_names
    assert torch.equal(again.train.images, splits.train.images)


def test_more_training_classes_only_add_some(splits: DataSplits) -> None:
    more = load_glyphs(train_classes=300)
    assert set(splits.train.class_names) < set(more.train.class_names)
    assert more.val.class_names == splits.val.class_names and more.test.class_names == splits.test.class_names
    assert more.digest != splits.digest


def test_lookalikes_are_joined_by_chains_of_equal_images() -> None:
    images = np.arange(5 * 3, dtype=np.uint8).reshape(5, 3, 1, 1)
    assert lookalikes(images) == {}
    images[4, 2] = images[3, 0]  # in another face
    images[3, 1] = images[1, 1]
    images[2, 0] = images[2, 1]  # within a class
    assert lookalikes(images) == {3: 1, 4: 1}
    images[0, 2] = images[4, 0]  # a later class joins two groups
    assert lookalikes(images) == {1: 0, 3: 0, 4: 0}


def test_merged_classes_share_no_image(splits: DataSplits, drawn: tuple[list[int], np.ndarray]) -> None:
    merged = load_glyphs(merge_lookalikes=True)
    owners: dict[bytes, set[str]] = {}
    for part in (merged.train, merged.val, merged.test):
        for image, label in zip(part.images.numpy(), part.labels.tolist(), strict=True):
            owners.setdefault(image.tobytes(), set()).add(part.class_names[label])
    assert all(len(classes) == 1 for classes in owners.values())
    kept = {name.split()[1] for name in (*splits.test.class_names, *splits.train.class_names)}
    left_out = {chr(drawn[0][c]) for c in lookalikes(drawn[1])}
    # Cyrillic Ze and a digit, three of four dashes, two sorts of bullet, Greek kappa and Cyrillic ka.
    assert {"\u0417", "\u2013", "\u2014", "\u2015", "\u2219", "\u03ba", "\u043a"} <= left_out
    assert not {"3", "\u2012", "\u00b7", "\u0138"} & left_out and kept & left_out
    # Of the classes that are kept, none changes the side.
    assert set(merged.test.class_names) == {n for n in splits.test.class_names if n.split()[1] not in left_out}
    assert merged.digest != splits.digest and merged.train.num_classes == 200 and merged.val.num_classes == 100


def test_a_perfect_network_finds_everything_in_merged_classes_only(splits: DataSplits) -> None:
    """An image that two classes have is found in both, whatever a network makes of it."""
    for whole, perfect in ((splits, False), (load_glyphs(merge_lookalikes=True), True)):
        owners: dict[bytes, set[int]] = {}
        for image, label in zip(whole.test.images.numpy(), whole.test.labels.tolist(), strict=True):
            owners.setdefault(image.tobytes(), set()).add(label)
        assert all(len(labels) == 1 for labels in owners.values()) == perfect


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train_classes": 1}, "train_classes is 1"),
        ({"val_classes": 1}, "val_classes is 1; it must be at least 2, or 0 for none"),
        ({"train_classes": 1000}, "together they must be at most 10.., the number"),
    ],
)
def test_sizes_out_of_range(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_glyphs(**sizes)


def test_no_validation_classes(splits: DataSplits) -> None:
    without = load_glyphs(val_classes=0)
    assert without.val is None
    assert torch.equal(without.train.images, splits.train.images) and without.digest != splits.digest


def test_without_matplotlib_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r'pip install "gcahng\[train\]"') as caught:
        load_glyphs()
    assert "\n" not in str(caught.value)
