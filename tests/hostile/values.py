"""Values and bytes that programs stumble over."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

# Whole numbers, from usual to absurd.
WHOLE = (
    0,
    1,
    -1,
    2,
    3,
    -5,
    7,
    255,
    65536,
    2**31 - 1,
    2**31,
    2**32,
    10**9,
    10**12,
    2**63 - 1,
    2**63,
    2**64,
    10**18,
    10**30,
)
REAL = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, 5e-324, float("inf"), float("-inf"), float("nan"), 1e39, -1e-9)
TEXT = (
    "",
    " ",
    "-",
    "--",
    "null",
    "None",
    "true",
    "nan",
    "1e3",
    "1_000",
    "0x10",
    "１２",
    "é",
    "e\u0301",
    "a\u2028b",
    "a\nb",
    "a\tb",
    "\u202egnp.exe",
    "💥",
    "${HOME}",
    "~",
    "%s%n",
    "{0}",
    "[1, 2]",
    "a: b",
    "../..",
    "x" * 300,
    "x" * 5000,
    "not\udcff utf8",
)
OTHER: tuple[Any, ...] = (None, True, False, [], {}, [1, 2], {"a": 1}, b"bytes", 3 + 4j, object)


def number_text(chance: random.Random) -> str:
    """A number as someone might type it, or what stands in its place."""
    kinds = (
        (chance.choice(WHOLE), -chance.choice(WHOLE)),
        (chance.choice(REAL), chance.choice(REAL)),
        (chance.choice(TEXT),),
    )
    return str(chance.choice(chance.choices(kinds, (6, 2, 1))[0]))


def anything(chance: random.Random) -> Any:
    """A value of any type."""
    return chance.choice(chance.choice((WHOLE, REAL, TEXT, OTHER)))


def path_text(chance: random.Random, folder: Path) -> str:
    """A path that is not what a command expects, made below `folder` where it must exist."""
    return str(hostile_path(chance, folder))


def hostile_path(chance: random.Random, folder: Path, suffix: str | None = None) -> Path:
    """A path of some hostile kind.

    Args:
        chance: of the case.
        folder: where it is made.
        suffix: of its name; None: one by chance.
    """
    import os

    if suffix is None:
        suffix = chance.choice(
            ("", ".jpg", ".npy", ".safetensors", ".index", ".csv", ".yaml", ".txt", ".pt", ".json", ".onnx")
        )
    path = folder / f"odd-{chance.randrange(10**6)}{suffix}"
    kind = chance.choice(PATHS)
    if kind == "loop":
        path.symlink_to(path.name)
    elif kind == "two-links":
        other = path.with_name("other-" + path.name)
        path.symlink_to(other.name)
        other.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("not-there")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(chance.randbytes(chance.choice((1, 7, 100, 5000))))
    elif kind == "text":
        path.write_text(chance.choice(TEXT), errors="surrogateescape")
    elif kind == "long":
        path = folder / ("n" * 300 + suffix)
    elif kind == "deep":
        path = folder / "/".join(["d" * 200] * 30) / f"x{suffix}"
    elif kind == "no-utf8":
        path = folder / f"not\udcffutf8{suffix}"
        if chance.random() < 0.5:
            path.write_bytes(b"x")
    elif kind == "below-file":
        path.write_bytes(b"x")
        path = path / f"x{suffix}"
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "full":
        path.symlink_to("/dev/full")
    elif kind == "null":
        path.symlink_to("/dev/null")
    elif kind == "space":
        path = folder / f" a b {suffix} "
    elif kind == "newline":
        path = folder / f"a\nb{suffix}"
    elif kind == "root":
        path = Path("/")
    elif kind == "proc":
        path = Path(chance.choice(("/proc/self/mem", "/proc/self/fd", "/proc/self/environ", "/sys/kernel")))
    return path


PATHS = [
    "missing",
    "loop",
    "two-links",
    "dangling",
    "fifo",
    "folder",
    "empty",
    "noise",
    "text",
    "long",
    "deep",
    "no-utf8",
    "below-file",
    "zero",
    "full",
    "null",
    "space",
    "newline",
    "root",
    "proc",
]


def damage(chance: random.Random, data: bytes) -> tuple[bytes, str]:
    """Damaged bytes, and in words how. At least one byte differs where there is one."""
    kinds = ("flip", "flips", "cut", "grow", "zeros", "swap", "drop", "repeat", "empty", "byte")
    kind = chance.choice(kinds)
    if not data:
        return b"\x00", "a byte in an empty file"
    at = chance.choice((chance.randrange(len(data)), min(len(data) - 1, chance.randrange(200))))
    array = bytearray(data)
    if kind == "flip":
        array[at] ^= 1 << chance.randrange(8)
    elif kind == "flips":
        for _ in range(chance.choice((2, 10, 100))):
            array[chance.randrange(len(array))] ^= 1 << chance.randrange(8)
        if bytes(array) == data:
            array[at] ^= 1
    elif kind == "byte":
        array[at] = (array[at] + chance.randrange(1, 256)) % 256
    elif kind == "cut":
        del array[at:]
    elif kind == "grow":
        array += chance.randbytes(chance.choice((1, 8, 1000)))
    elif kind == "zeros":
        length = chance.choice((1, 8, 512))
        array[at : at + length] = bytes(len(array[at : at + length]))
    elif kind == "swap":
        other = chance.randrange(len(array))
        array[at], array[other] = array[other], array[at]
    elif kind == "drop":
        del array[at : at + chance.choice((1, 2, 64))]
    elif kind == "repeat":
        array[at:at] = array[at : at + chance.choice((1, 8, 64))]
    elif kind == "empty":
        array.clear()
    if bytes(array) == data:
        array[at] ^= 0x80
        kind = "flip"
    return bytes(array), f"{kind} at {at}"


def damage_file(chance: random.Random, path: Path) -> str:
    """Damage a file in place, and say how in words."""
    damaged, how = damage(chance, path.read_bytes())
    path.write_bytes(damaged)
    return f"{path.name}: {how}"
