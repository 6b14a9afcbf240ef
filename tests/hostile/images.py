"""Image files of every kind, whole and damaged, and files that are no images."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.case import FINE, REFUSED, Case, Fault, refused
from hostile.values import damage

_TURNS = {  # what a viewer does with a picture of each EXIF orientation
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def case(case: Case) -> str:
    """One image file, read by itself or embedded in a folder of others."""
    chance = case.chance
    if chance.random() < 0.12:
        return _not_an_image(case)
    name, data, right = _make(chance)
    path = case.folder / f"picture{name}"
    damaged = chance.random() < 0.6
    how = "whole"
    if damaged:
        data, how = _bomb(chance, data) if chance.random() < 0.1 else damage(chance, data)
    path.write_bytes(data)
    case.tell(f"{path.name}, {how}")
    if chance.random() < 0.25:
        return _embed(case, path, damaged)
    from gcahng.data.reading import read_rgb

    found: list[Any] = []
    if refused(lambda: found.append(read_rgb(path, exif_rotate=True))):
        if not damaged:
            raise Fault("wrong", "a whole image was refused")
        return REFUSED
    _check(found[0], right, damaged, name)
    return FINE


def _check(image: Any, right: Any, damaged: bool, name: str) -> None:
    """A whole image has the right colors. A damaged PNG does too, because it carries checksums."""
    import numpy as np

    if image.mode != "RGB":
        raise Fault("wrong", f"a {image.mode} image, not RGB")
    if damaged:
        return
    pixels = np.asarray(image).astype(int)
    if right is None:
        return
    allowed = 12 if name in (".jpg", ".webp") else 1
    if pixels.shape != right.shape:
        raise Fault("wrong", f"{pixels.shape} pixels, not {right.shape}")
    if np.abs(pixels - right).max() > allowed:
        raise Fault("wrong", f"colors are off by {np.abs(pixels - right).max()} of 255")


def _make(chance: random.Random) -> tuple[str, bytes, Any]:
    """A suffix, the bytes of a whole image, and its right colors (H, W, 3); None: not stated."""
    kinds: tuple[Callable[[random.Random], tuple[str, bytes, Any]], ...] = (
        _plain,
        _plain,
        _gray16,
        _pgm16,
        _transparent,
        _palette,
        _turned,
        _png16_transparent,
        _modes,
    )
    return chance.choice(kinds)(chance)


def _smooth(chance: random.Random, channels: int = 3) -> Any:
    """Colors without sharp edges, which lossy formats keep."""
    import numpy as np

    height, width = chance.choice((17, 24)), chance.choice((20, 31))
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    planes = [np.clip(255 * (chance.random() * x + chance.random() * y) / 2, 0, 255) for _ in range(channels)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def _saved(image: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _rgb(gray: Any) -> Any:
    import numpy as np

    return np.repeat(gray[..., None], 3, axis=-1).astype(int)


def _plain(chance: random.Random) -> tuple[str, bytes, Any]:
    from PIL import Image

    colors = _smooth(chance)
    suffix, kind, options = chance.choice(
        (
            (".png", "PNG", {}),
            (".jpg", "JPEG", {"quality": 95, "subsampling": 0}),
            (".jpg", "JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
            (".bmp", "BMP", {}),
            (".ppm", "PPM", {}),
            (".tif", "TIFF", {}),
            (".tif", "TIFF", {"compression": "tiff_lzw"}),
            (".webp", "WEBP", {"lossless": True}),
        )
    )
    return suffix, _saved(Image.fromarray(colors), kind, **options), colors.astype(int)


def _gray16(chance: random.Random) -> tuple[str, bytes, Any]:
    import numpy as np
    from PIL import Image

    values = _smooth(chance, 1)[..., 0].astype(np.uint16) * 257
    suffix, kind = chance.choice(((".png", "PNG"), (".tif", "TIFF")))
    return suffix, _saved(Image.fromarray(values), kind), _rgb(values // 257)


def _pgm16(chance: random.Random) -> tuple[str, bytes, Any]:
    """As written by scanners: big-endian, with any largest value."""
    import numpy as np

    gray = _smooth(chance, 1)[..., 0]
    most = chance.choice((255, 65535, 1023, 256))
    values = np.round(gray / 255 * most).astype(">u2" if most > 255 else "u1")
    head = f"P5\n{gray.shape[1]} {gray.shape[0]}\n{most}\n".encode()
    return ".pgm", head + values.tobytes(), _rgb(np.round(values.astype(float) / most * 255))


def _transparent(chance: random.Random) -> tuple[str, bytes, Any]:
    import numpy as np
    from PIL import Image

    colors = _smooth(chance, 4)
    alpha = colors[..., 3:].astype(float) / 255
    right = np.round(colors[..., :3] * alpha + 255 * (1 - alpha)).astype(int)
    suffix, kind, options = chance.choice(((".png", "PNG", {}), (".webp", "WEBP", {"lossless": True, "exact": True})))
    if chance.random() < 0.3:  # gray with alpha
        image = Image.fromarray(colors).convert("LA")
        gray = np.asarray(image)[..., 0].astype(float)[..., None]
        return (
            ".png",
            _saved(image, "PNG"),
            np.repeat(np.round(gray * alpha + 255 * (1 - alpha)), 3, axis=-1).astype(int),
        )
    return suffix, _saved(Image.fromarray(colors), kind, **options), right


def _palette(chance: random.Random) -> tuple[str, bytes, Any]:
    import numpy as np
    from PIL import Image

    image = Image.fromarray(_smooth(chance)).quantize(chance.choice((2, 16, 200)))
    right = np.asarray(image.convert("RGB")).astype(int)
    suffix, kind = chance.choice(((".png", "PNG"), (".gif", "GIF"), (".bmp", "BMP")))
    if kind == "PNG" and chance.random() < 0.5:
        index = int(np.asarray(image)[0, 0])
        right[np.asarray(image) == index] = 255
        return suffix, _saved(image, kind, transparency=index), right
    return suffix, _saved(image, kind), right


def _turned(chance: random.Random) -> tuple[str, bytes, Any]:
    """A photograph that says how it was held."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray(_smooth(chance))
    exif = Image.Exif()
    exif[0x0112] = orientation = chance.choice((1, *_TURNS, 0, 9, 65535))
    upright = image.transpose(Image.Transpose[_TURNS[orientation]]) if orientation in _TURNS else image
    return (
        ".jpg",
        _saved(image, "JPEG", quality=95, subsampling=0, exif=exif.tobytes()),
        np.asarray(upright).astype(int),
    )


def _png16_transparent(chance: random.Random) -> tuple[str, bytes, Any]:
    """16-bit gray with one value that is transparent (tRNS), which PIL itself cannot write."""
    import numpy as np

    values = _smooth(chance, 1)[..., 0].astype(np.uint16) * 257
    clear = int(values[0, 0])
    right = _rgb(values // 257)
    right[values == clear] = 255
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"tRNS", struct.pack(">H", clear)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return ".png", b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts), right


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _modes(chance: random.Random) -> tuple[str, bytes, Any]:
    import numpy as np
    from PIL import Image

    colors = Image.fromarray(_smooth(chance))
    mode = chance.choice(("1", "L", "CMYK", "LA", "P"))
    if mode == "CMYK":
        return ".jpg", _saved(colors.convert("CMYK"), "JPEG", quality=95), None
    image = colors.convert(mode)
    return ".png", _saved(image, "PNG"), np.asarray(image.convert("RGB")).astype(int)


def _bomb(chance: random.Random, data: bytes) -> tuple[bytes, str]:
    """A small file that says it is enormous."""
    side = chance.choice((20_000, 60_000, 2**31 - 1))
    if chance.random() < 0.5:
        head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        parts = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(10000))), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts), f"a PNG of {side} x {side}"
    return f"P6\n{side} {side}\n255\n".encode() + bytes(1000), f"a PPM of {side} x {side}"


def _not_an_image(case: Case) -> str:
    """Something else under an image's name, in a folder and named by itself."""
    path = case.folder / "photos" / "odd.jpg"
    path.parent.mkdir()
    kind = case.chance.choice(
        ("fifo", "folder", "loop", "dangling", "zero", "socket", "html", "empty", "null", "svg", "locked")
    )
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("loop", "dangling", "zero", "null"):
        path.symlink_to({"loop": "odd.jpg", "dangling": "gone.jpg", "zero": "/dev/zero", "null": "/dev/null"}[kind])
    elif kind == "socket":
        import socket

        where = Path.cwd()
        os.chdir(path.parent)  # a socket's name must be short
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(where)
    else:
        path.write_bytes({"html": b"<html>404</html>", "empty": b"", "svg": b"<svg/>", "locked": b"x"}[kind])
    case.tell(f"odd.jpg is: {kind}")
    good = case.folder / "photos" / "good.png"
    good.write_bytes(next((case.world / "folder").rglob("*.png")).read_bytes())
    source = case.chance.choice((path, path.parent))
    more = case.chance.choice(([], ["--skip_unreadable"]))
    if kind == "locked" and os.getuid() == 0:
        path.chmod(0)
        for folder in (case.folder, path.parent, case.notes):
            folder.chmod(0o777)
        run = case.copy("run")
        os.setuid(65534)
    else:
        run = case.copy("run")
    ran = case.command("embed", run, source, "--out", case.folder / "e.npy", "--data.workers", "0", *more)
    if ran.status == 0 and source == path:
        raise Fault("wrong", "what is no image was embedded")
    if ran.status == 0 and kind != "folder" and "odd.jpg" not in ran.err + ran.out:
        raise Fault("wrong", "an image was left out without a word")
    return ran.verdict


def _embed(case: Case, path: Path, damaged: bool) -> str:
    run = case.copy("run")
    ran = case.command("embed", run, path, "--out", case.folder / "e.npy", "--data.workers", "0")
    if ran.status and not damaged:
        raise Fault("wrong", f"a whole image was refused: {ran.err.strip()[-300:]}")
    if ran.status and path.name not in ran.err:
        raise Fault("manners", f"the image is not named: {ran.err.strip()[-300:]}")
    return ran.verdict
