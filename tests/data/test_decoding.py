"""Files that are written byte by byte decode to values that were computed by hand."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gcahng.data import ImageFiles, UnreadableImage, read_image, read_rgb

GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6


def png(width: int, depth: int, color: int, row: bytes, **chunks: bytes) -> bytes:
    """A PNG of one row, with chunks before its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0))
    before = b"".join(chunk(kind.encode(), content) for kind, content in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def tiff(
    width: int, bits: int, photometric: int, row: bytes, order: str = "<", *, channels: int = 1, **tags: int
) -> bytes:
    """An uncompressed TIFF of one row. Further tags are t338=1 for ExtraSamples and the like."""
    short: dict[int, tuple[int, ...]] = {
        256: (width,), 257: (1,), 258: (bits,) * channels, 259: (1,), 262: (photometric,), 273: (8,), 277: (channels,),
        278: (1,), 279: (len(row),),
    }  # fmt: skip
    short |= {int(name[1:]): (value,) for name, value in tags.items()}
    row += b"\0" * (len(row) % 2)
    after = 8 + len(row) + 2 + 12 * len(short) + 4
    fields, values = b"", b""
    for tag in sorted(short):
        content = struct.pack(f"{order}{len(short[tag])}H", *short[tag])
        if len(content) > 4:
            content, values = struct.pack(f"{order}I", after + len(values)), values + content
        fields += struct.pack(f"{order}HHI", tag, 3, len(short[tag])) + content.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(row))
    return head + row + struct.pack(f"{order}H", len(short)) + fields + struct.pack(f"{order}I", 0) + values


def shorts(*values: int, order: str = ">") -> bytes:
    return struct.pack(f"{order}{len(values)}H", *values)


W = 255  # what is transparent lies on white

# What is in the file, its suffix, and the red, green and blue (or the gray) of each pixel.
DECODED = {
    # 0x1234 / 257 = 18.13; 32768 / 257 = 127.5019…
    "16-bit gray PNG": (png(2, 16, GRAY, shorts(0x1234, 32768)), "png", [18, 128]),
    "16-bit gray PNG, transparent color": (
        png(3, 16, GRAY, shorts(0x1234, 0x1235, 0x5A5A), tRNS=shorts(0x1235)), "png", [18, W, 90],
    ),
    "8-bit gray PNG, transparent color": (png(2, 8, GRAY, bytes([7, 9]), tRNS=shorts(7)), "png", [W, 9]),
    "4-bit gray PNG, transparent color": (png(2, 4, GRAY, b"\x5a", tRNS=shorts(5)), "png", [W, 170]),
    "2-bit gray PNG, transparent color": (png(4, 2, GRAY, b"\x1b", tRNS=shorts(1)), "png", [0, W, 170, 255]),
    "1-bit PNG": (png(4, 1, GRAY, b"\xa0"), "png", [255, 0, 255, 0]),
    "1-bit PNG, black transparent": (png(2, 1, GRAY, b"\x80", tRNS=shorts(0)), "png", [255, W]),
    "RGB PNG, transparent color": (
        png(2, 8, RGB, bytes([1, 2, 3, 4, 5, 6]), tRNS=shorts(1, 2, 3)), "png", [(W, W, W), (4, 5, 6)],
    ),
    "16-bit RGB PNG, transparent color": (
        png(2, 16, RGB, shorts(0x1234, 0, 0x5600, 0x2000, 0, 0xFFFF), tRNS=shorts(0x1234, 0, 0x5600)),
        "png", [(W, W, W), (0x20, 0, 255)],
    ),
    # gray 0 with an opacity of 51 / 255 = 0.2 on white is 0.8 · 255 = 204
    "gray PNG with alpha": (png(2, 8, GRAY_ALPHA, bytes([0, 51, 90, 255])), "png", [204, 90]),
    "16-bit gray PNG with alpha": (png(1, 16, GRAY_ALPHA, shorts(0, 51 * 257)), "png", [204]),
    "16-bit RGB PNG with alpha": (png(1, 16, RGBA, shorts(0, 255 * 257, 0, 51 * 257)), "png", [(204, 255, 204)]),
    "palette PNG": (png(2, 8, PALETTE, b"\1\0", PLTE=bytes([9, 8, 7, 1, 2, 3])), "png", [(1, 2, 3), (9, 8, 7)]),
    "palette PNG with alpha": (
        png(2, 4, PALETTE, b"\x10", PLTE=bytes([0, 0, 0, 1, 2, 3]), tRNS=b"\x33"), "png", [(1, 2, 3), (204, 204, 204)],
    ),
    "16-bit PGM": (b"P5 3 1 65535\n" + shorts(90 * 257, 255, 65535), "pgm", [90, 1, 255]),
    "12-bit PGM": (b"P5 2 1 4095\n" + shorts(4095, 1000), "pgm", [255, 62]),  # 1000 / 4095 · 255 = 62.27
    "16-bit PGM in plain text": (b"P2 2 1 65535\n23130 65535\n", "pgm", [90, 255]),
    "8-bit PGM": (b"P5 2 1 100\n" + bytes([50, 100]), "pgm", [128, 255]),
    "16-bit PPM": (b"P6 1 1 65535\n" + shorts(90 * 257, 255, 65535), "ppm", [(90, 1, 255)]),
    "1-bit PBM in a PGM": (b"P4 2 1\n\x80", "pgm", [0, 255]),
    "16-bit TIFF, little-endian": (tiff(2, 16, 1, shorts(90 * 257, 255, order="<")), "tif", [90, 1]),
    "16-bit TIFF, big-endian": (tiff(2, 16, 1, shorts(90 * 257, 255), ">"), "tif", [90, 1]),
    "16-bit TIFF, white is 0": (tiff(2, 16, 0, shorts(90 * 257, 65535, order="<")), "tif", [165, 0]),
    "12-bit TIFF": (tiff(2, 12, 1, b"\xff\xf3\xe8"), "tif", [255, 62]),
    "8-bit TIFF, white is 0": (tiff(2, 8, 0, bytes([0, 90])), "tif", [255, 165]),
    "16-bit RGB TIFF": (tiff(1, 16, 2, shorts(90 * 257, 0, 65535, order="<"), channels=3), "tif", [(90, 0, 255)]),
    # premultiplied (ExtraSamples 1): 100 · 255 / 128 = 199, and on white 199 · 128/255 + 255 · 127/255 = 226.9
    "premultiplied TIFF": (tiff(1, 8, 2, bytes([100, 20, 20, 128]), channels=4, t338=1), "tif", [(227, 147, 147)]),
    "TIFF with alpha": (tiff(1, 8, 2, bytes([100, 20, 20, 0]), channels=4, t338=2), "tif", [(W, W, W)]),
    "CMYK TIFF": (tiff(2, 8, 5, bytes([255, 0, 0, 0, 0, 0, 0, 165]), channels=4), "tif", [(0, 255, 255), (90,) * 3]),
}  # fmt: skip


@pytest.mark.parametrize("case", DECODED)
def test_every_pixel_has_its_value(case: str, tmp_path: Path) -> None:
    content, suffix, pixels = DECODED[case]
    path = tmp_path / f"image.{suffix}"
    path.write_bytes(content)
    expected = [pixel if isinstance(pixel, tuple) else (pixel,) * 3 for pixel in pixels]
    assert np.asarray(read_rgb(path)).tolist() == [[list(pixel) for pixel in expected]]


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (tiff(2, 32, 1, struct.pack("<ff", 0.5, 1), t339=3), "F"),
        (tiff(2, 32, 1, struct.pack("<II", 5, 7)), "I"),
        (tiff(2, 16, 1, struct.pack("<hh", -5, 7), t339=2), "I"),  # negative numbers are no brightness
    ],
)
def test_values_without_a_known_white_are_refused(content: bytes, mode: str, tmp_path: Path) -> None:
    (tmp_path / "image.tif").write_bytes(content)
    with pytest.raises(UnreadableImage, match=f"it has {mode} pixels of 32 bits; a channel must have 8 or 16"):
        read_rgb(tmp_path / "image.tif")


UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40  # 2 rows of 3 pixels, all different


def stored(orientation: int) -> np.ndarray:
    """The pixels as a camera stores them with an orientation: where the upright image's row 0 and column 0 are."""
    return {
        1: UPRIGHT,  # top, left
        2: UPRIGHT[:, ::-1],  # top, right
        3: UPRIGHT[::-1, ::-1],  # bottom, right
        4: UPRIGHT[::-1],  # bottom, left
        5: UPRIGHT.T,  # left, top
        6: UPRIGHT.T[::-1],  # right, top: the stored image is turned clockwise to be upright
        7: UPRIGHT.T[::-1, ::-1],  # right, bottom
        8: UPRIGHT.T[:, ::-1],  # left, bottom
    }[orientation]


def with_orientation(path: Path, pixels: np.ndarray, orientation: object) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))
    return path


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations(orientation: int, suffix: str, tmp_path: Path) -> None:
    path = with_orientation(tmp_path / f"image.{suffix}", stored(orientation), orientation)
    upright = np.asarray(read_rgb(path, exif_rotate=True))
    assert upright.shape == (2, 3, 3) and np.array_equal(upright[..., 0], UPRIGHT)
    assert np.array_equal(np.asarray(read_rgb(path))[..., 0], stored(orientation)), "off, nothing is turned"
    for exif_rotate, expected in ((True, (3, 2)), (False, stored(orientation).shape[::-1])):
        files = ImageFiles(tmp_path, (path.name,), None, (), exif_rotate)  # type: ignore[arg-type]
        assert read_image(files, 0).size == expected


def test_the_exif_standards_names_of_the_orientations() -> None:
    """`stored` is right: it has the upright image's first row and first column where the standard says they are."""
    sides = {"top": (0, slice(None)), "bottom": (-1, slice(None)), "left": (slice(None), 0), "right": (slice(None), -1)}
    corners = ("top left", "top right", "bottom right", "bottom left")
    named = (*corners, "left top", "right top", "right bottom", "left bottom")
    # TIFF 6.0, tag 274: 6 means that row 0 is the visual right side, and column 0 the visual top.
    for orientation, (row_0, column_0) in enumerate((name.split() for name in named), start=1):
        pixels = stored(orientation)
        assert sorted(pixels[0]) == sorted(UPRIGHT[sides[row_0]])
        assert sorted(pixels[:, 0]) == sorted(UPRIGHT[sides[column_0]])


def test_a_jpeg_of_a_phone(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, :16] = 255  # white on the left
    path = with_orientation(tmp_path / "image.jpg", pixels, 6)  # to be turned clockwise: white comes to the top
    read = np.asarray(read_rgb(path, exif_rotate=True))
    assert read.shape == (32, 16, 3) and read[:16].min() > 240 and read[16:].max() < 15


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing(orientation: int, tmp_path: Path) -> None:
    path = with_orientation(tmp_path / "image.png", UPRIGHT, orientation)
    assert np.array_equal(np.asarray(read_rgb(path, exif_rotate=True))[..., 0], UPRIGHT)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0garbage garbage garbage",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",  # the first directory is far behind the end
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",  # 65,535 entries that are not there
        b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\x02\0\0\0\4abc\0\0\0\0\0",  # the orientation is text
    ],
)
def test_broken_exif_is_no_error(exif: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.fromarray(np.full((8, 16), 90, np.uint8)).save(path)
    plain = path.read_bytes()
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    path.write_bytes(plain[:2] + segment + plain[2:])
    read = np.asarray(read_rgb(path, exif_rotate=True))
    assert read.shape == (8, 16, 3) and np.abs(read.astype(int) - 90).max() <= 1


@pytest.mark.parametrize("exif_rotate", [False, True])
def test_the_orientation_of_a_tiff_is_no_exif(exif_rotate: bool, tmp_path: Path) -> None:
    """PIL turns TIFF files by itself, which must happen once; and it scrambles those that it maps into memory."""
    for orientation in range(1, 9):
        for compression in (None, "tiff_lzw"):
            path = tmp_path / "image.tif"
            exif = Image.Exif()
            exif[0x0112] = orientation
            Image.fromarray(np.ascontiguousarray(stored(orientation))).save(path, exif=exif, compression=compression)
            assert np.array_equal(np.asarray(read_rgb(path, exif_rotate=exif_rotate))[..., 0], UPRIGHT)
