"""What the pixels of an opened image file mean, as RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0


def decode(image: PILImage, *, exif_rotate: bool = False) -> PILImage:
    """The pixels of an image that PIL has opened, as RGB.

    Gray images of up to 16 bits, CMYK, Lab and palette images are converted. Transparent pixels are blended with white.

    Args:
        image: opened, but not loaded yet.
        exif_rotate: whether the image is rotated and mirrored as its EXIF orientation says. PIL itself does so for the
            orientation of a TIFF file, which is no EXIF.

    Raises:
        ValueError: the pixels have 32 bits, so that nothing says which values are black and white.
        Exception: PIL cannot decode the file.
    """
    from PIL import Image

    stored = image.tile[0].args if getattr(image, "tile", None) else None  # loading forgets it
    image.load()
    # PIL reads PGM files of more than 8 bits as 32 bits, scaled to 0 … 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        rgb = Image.fromarray(_gray_of_16_bits(image)).convert("RGB")
    elif image.mode in ("I", "F"):
        raise ValueError(f"it has {image.mode} pixels of 32 bits; a channel must have 8 or 16 bits")
    elif {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        _scale_transparent_color(image, stored)
        white = Image.new("RGBA", image.size, "white")
        rgb = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    else:
        rgb = image.convert("RGB")
    turn = _turn(image) if exif_rotate else None
    return rgb if turn is None else rgb.transpose(turn)


def _gray_of_16_bits(image: PILImage) -> np.ndarray:
    """(H, W) uint8. PIL's own conversion clips values above 255, and knows no transparent color."""
    values = np.asarray(image).astype(np.uint16)
    tags: Any = getattr(image, "tag_v2", {})
    most = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    gray = (values / (most / 255)).round().astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        gray = 255 - gray
    transparent = image.info.get("transparency")
    return gray if transparent is None else np.where(values == transparent, np.uint8(255), gray)


def _scale_transparent_color(image: PILImage, stored: object) -> None:
    """Bring a PNG's transparent color to 8 bits a channel. PIL does so with the pixels alone, and then finds none."""
    color = image.info.get("transparency")
    if isinstance(color, int) and stored in ("L;2", "L;4"):
        image.info["transparency"] = color * {"L;2": 85, "L;4": 17}[str(stored)]
    elif isinstance(color, tuple) and stored == "RGB;16B":
        image.info["transparency"] = tuple(channel >> 8 for channel in color)


def _turn(image: PILImage) -> Any:
    """The transposition that makes an image upright; None: it is upright, or its EXIF data is damaged."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # whatever the parser stumbles over; the pixels are good
        return None
    return turns.get(orientation) if isinstance(orientation, int) else None
