"""Small pictures of images, as data URIs."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from gcahng.data import ImageFiles, LabeledImages, read_image
from gcahng.errors import UserError
from gcahng.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 112
SPRITE_SIDE = 64
SPRITE_COLUMNS = 32


def data_uri(images: LabeledImages, index: int) -> str:
    """Image `index` as a square from its middle, at most `SIDE` pixels wide."""
    return _encode(_square(images, index, SIDE))


def sprite(images: LabeledImages, indices: list[int]) -> tuple[str, int]:
    """One picture of several images.

    Args:
        images: that they are among.
        indices: which images.

    Returns:
        A data URI of the images in rows of `SPRITE_COLUMNS`, and the side of each in pixels.
    """
    from PIL import Image

    squares = [_square(images, index, SPRITE_SIDE) for index in indices]
    side = squares[0].width
    rows = -(-len(squares) // SPRITE_COLUMNS)
    sheet = Image.new(squares[0].mode, (SPRITE_COLUMNS * side, rows * side))
    for place, square in enumerate(squares):
        sheet.paste(square, (place % SPRITE_COLUMNS * side, place // SPRITE_COLUMNS * side))
    return _encode(sheet), side


def _square(images: LabeledImages, index: int, side: int) -> Image:
    """An image, gray or RGB; small images stay as they are, all others are scaled to `side`."""
    require("PIL", extra="train", purpose="pictures are drawn")
    from PIL import Image, ImageOps

    if isinstance(images, ImageFiles):
        return ImageOps.fit(read_image(images, index), (side, side))
    pixels = images.images[index].cpu()
    if pixels.ndim == 3:
        pixels = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    picture = Image.fromarray(pixels.contiguous().numpy())
    side = min(side, *picture.size)
    return picture if picture.size == (side, side) else ImageOps.fit(picture, (side, side))


def _encode(picture: Image) -> str:
    from PIL import features

    if not features.check("webp"):
        raise UserError("Pillow was built without WebP, which the report's pictures need; pip install pillow brings it")
    buffer = io.BytesIO()
    drawing = picture.mode == "L"  # its sharp edges take fewer bytes without loss
    picture.save(buffer, "WEBP", lossless=drawing, quality=75, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
