"""The `glyphs` data set: characters drawn with the DejaVu fonts that matplotlib ships, so nothing is downloaded.

A class is a character. Its 12 images show it in 12 faces: Sans, Sans Mono and Serif, each regular, bold, slanted, and
bold and slanted.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gcahng.data.image_set import DataSplits, ImageSet
from gcahng.errors import UserError
from gcahng.extras import require

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

FACES = tuple(
    family + style
    for family, slanted in (("DejaVuSans", "Oblique"), ("DejaVuSansMono", "Oblique"), ("DejaVuSerif", "Italic"))
    for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")
)
IMAGE_SIZE = 32
# The largest size at which no character is cut off: they reach from 25 rows above the baseline to 7 rows below it.
PIXELS_PER_EM = 22
BASELINE_ROW = 25
SPLIT_SEED = 20250
_POINTS_PER_INCH = 72  # at this resolution a size in points is a size in pixels


def load_glyphs(train_classes: int = 200, val_classes: int = 100, *, merge_lookalikes: bool = False) -> DataSplits:
    """Draw the characters and split the classes: one half tests, the other half trains and validates.

    The split is fixed and does not depend on the seed of a run. The first `train_classes` of the second half train and
    the last `val_classes` validate, so asking for more training classes only adds some.

    Args:
        train_classes: number of training classes, at least 2.
        val_classes: number of validation classes, at least 2, or 0 for none.
        merge_lookalikes: whether characters that `lookalikes` finds are one class, with the images of the one that is
            kept. The others keep their place in the split, except that classes move up in the order of training.

    Returns:
        Splits of (N, 32, 32) uint8 images, bright ink on black, 12 of each class. Drawing takes about a second.

    Raises:
        UserError: matplotlib is missing, or there are too few classes besides the test classes.
    """
    for name, value in (("train_classes", train_classes), ("val_classes", val_classes)):
        if value < 2 and (name, value) != ("val_classes", 0):
            raise UserError(f"{name} is {value}; it must be at least 2{', or 0 for none' * (name == 'val_classes')}")
    _require_matplotlib()
    codes, images = _drawn_once()
    num_classes = len(codes)
    # RandomState, unlike numpy's newer generators, promises the same numbers in every version.
    order = np.random.RandomState(SPLIT_SEED).permutation(num_classes)
    half = num_classes // 2
    test, rest = order[:half], order[half:]
    if merge_lookalikes:
        left_out = sorted(_lookalikes_once())
        test, rest = test[~np.isin(test, left_out)], rest[~np.isin(rest, left_out)]
    if train_classes + val_classes > len(rest):
        raise UserError(
            f"train_classes is {train_classes} and val_classes is {val_classes}; together they must be at most "
            f"{len(rest)}, the number of glyph classes that are not held out for testing"
        )
    picks = {"train": rest[:train_classes], "val": rest[len(rest) - val_classes :], "test": test}
    digest = hashlib.sha256()
    splits: dict[str, ImageSet | None] = {}
    for name, pick in picks.items():
        if not len(pick):
            splits[name] = None
            continue
        chosen = np.sort(pick)
        pixels = images[chosen]
        digest.update(pixels.tobytes())
        splits[name] = ImageSet(
            images=torch.from_numpy(pixels.reshape(-1, IMAGE_SIZE, IMAGE_SIZE)),
            labels=torch.arange(len(chosen)).repeat_interleave(len(FACES)),
            class_names=tuple(f"U+{codes[c]:04X} {chr(codes[c])}" for c in chosen),
        )
    return DataSplits(**splits, digest=digest.hexdigest()[:16])


def draw_glyphs() -> tuple[list[int], np.ndarray]:
    """The code points of all classes, ascending, and their images (classes, 12, 32, 32) uint8, in `FACES` order."""
    fonts = _open_fonts()
    codes = _class_code_points(fonts)
    images = np.zeros((len(codes), len(fonts), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for face, font in enumerate(fonts):
        font.set_size(PIXELS_PER_EM, _POINTS_PER_INCH)
        for place, code in enumerate(codes):
            images[place, face] = _draw(font, code)
    return codes, images


def lookalikes(images: np.ndarray) -> dict[int, int]:
    """Classes of which some image is another class's image, pixel for pixel.

    No network can tell two such images apart, so with both classes none finds every image's own class.

    Args:
        images: (classes, faces, height, width) uint8.

    Returns:
        The class that each of them looks like, which is kept: the first of its group. A group is what chains of equal
        images join.
    """
    first = np.arange(len(images))
    owners: dict[bytes, int] = {}

    def kept(c: int) -> int:
        while first[c] != c:
            c = int(first[c])
        return c

    for c, faces in enumerate(images):
        for image in faces:
            a, b = sorted((kept(owners.setdefault(image.tobytes(), c)), kept(c)))
            first[b] = a
    return {c: kept(c) for c in range(len(images)) if kept(c) != c}


_drawn_once = lru_cache(maxsize=1)(draw_glyphs)


@lru_cache(maxsize=1)
def _lookalikes_once() -> dict[int, int]:
    return lookalikes(_drawn_once()[1])


def _require_matplotlib() -> None:
    require("matplotlib", extra="train", purpose="drawing the glyphs data set with the fonts that matplotlib ships")


def _open_fonts() -> list[FT2Font]:
    _require_matplotlib()
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    missing = [face for face in FACES if not (folder / f"{face}.ttf").is_file()]
    if missing:
        raise UserError(
            f"the glyphs data set needs {', '.join(missing)}, which {folder} does not have; reinstall matplotlib with "
            "the fonts that it ships (pip install --force-reinstall matplotlib)"
        )
    return [FT2Font(str(folder / f"{face}.ttf")) for face in FACES]


def _class_code_points(fonts: list[FT2Font]) -> list[int]:
    """Letters, numbers, symbols and punctuation that all fonts have. Of several with the same drawing, the lowest."""
    from matplotlib.ft2font import LoadFlags

    shared = set.intersection(*(set(font.get_charmap()) for font in fonts))
    seen: set[tuple[bytes, ...]] = set()
    codes = []
    for code in sorted(shared):
        if unicodedata.category(chr(code))[0] not in "LNSP":
            continue
        if any(font.load_char(code, flags=LoadFlags.NO_SCALE).width == 0 for font in fonts):
            continue
        drawing = _drawing(fonts[0], code)
        if drawing not in seen:
            seen.add(drawing)
            codes.append(code)
    return codes


def _drawing(font: FT2Font, code: int) -> tuple[bytes, ...]:
    """The outline in font units, independent of the order of contours, their first points and the horizontal offset.

    Outlines decide which characters look alike, because pixels depend on the version of FreeType.
    """
    from matplotlib.ft2font import LoadFlags

    font.load_char(code, flags=LoadFlags.NO_SCALE)
    points, kinds = font.get_path()
    starts = np.flatnonzero(kinds == 1)  # 1: the pen moves to the start of a contour; 79: the contour is closed
    drawn = kinds != 79
    points = points - [points[drawn, 0].min(), 0]
    contours = []
    for start, end in zip(starts, [*starts[1:], len(points)], strict=True):
        contour = points[start:end][drawn[start:end]]
        if len(contour) > 1 and (contour[0] == contour[-1]).all():
            contour = contour[:-1]
        first = np.lexsort((contour[:, 1], contour[:, 0]))[0]
        contours.append(contour[first:].tobytes() + contour[:first].tobytes())
    return tuple(sorted(contours))


def _draw(font: FT2Font, code: int) -> np.ndarray:
    """One (32, 32) image, centered horizontally on a common baseline. The few characters wider than 32 are cut."""
    from matplotlib.ft2font import LoadFlags

    font.set_text(chr(code), flags=LoadFlags.NO_HINTING)
    font.draw_glyphs_to_bitmap(antialiased=True)
    bitmap = np.array(font.get_image())
    rows, columns = np.flatnonzero(bitmap.any(axis=1)), np.flatnonzero(bitmap.any(axis=0))
    ink = bitmap[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = ink.shape
    if width > IMAGE_SIZE:
        cut = (width - IMAGE_SIZE) // 2
        ink, width = ink[:, cut : cut + IMAGE_SIZE], IMAGE_SIZE
    above_baseline = math.ceil(font.load_char(code, flags=LoadFlags.NO_HINTING).horiBearingY / 64)
    top, left = BASELINE_ROW - above_baseline, (IMAGE_SIZE - width) // 2
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    image[top : top + height, left : left + width] = ink
    return image
