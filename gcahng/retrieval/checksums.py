"""Checksums of embeddings on the disk.

They are CRC-32, which finds every flipped bit and every wrong run of up to 32 bits, and all but one in four billion of
other damage. It is several times as fast as a disk, where a cryptographic hash would take longer than reading.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np
from torch import Tensor

from gcahng.retrieval.items import Items, encode_names

# The key of the checksums in what is written with embeddings.
KEY = "crc32"

# Bytes that are summed at once. They are still in a core's cache when they are looked at again.
_BLOCK = 1 << 20


def rows_as_bytes(values: Tensor, block: int = _BLOCK) -> Iterator[np.ndarray]:
    """Yield the rows (n, D) as little-endian float32, in pieces of about `block` bytes."""
    for rows in values.split(max(1, block // (4 * max(1, values.shape[1])))):
        yield np.ascontiguousarray(rows.detach().cpu().float().numpy(), dtype="<f4")


def of_no_rows(shape: Sequence[int]) -> int:
    """The CRC-32 of embeddings of `shape` (n, D) before the first row; `with_rows` takes the rows in, in order."""
    return zlib.crc32(repr(tuple(shape)).encode())


def with_rows(crc: int, rows: np.ndarray) -> int:
    """The CRC-32 of what `crc` is of and the rows (b, D) float32 after it."""
    return zlib.crc32(np.ascontiguousarray(rows, dtype="<f4").reshape(-1).view(np.uint8), crc)


def as_text(crc: int) -> str:
    """A CRC-32 as files have it: 8 hexadecimal digits."""
    return f"{crc:08x}"


def of_embeddings(values: Tensor) -> str:
    """The checksum of embeddings (n, D), as text."""
    return as_text(reduce(with_rows, rows_as_bytes(values), of_no_rows(values.shape)))


def of_items(items: Items, about: dict[str, Any]) -> str:
    """The checksum of names, labels and all else that is written with embeddings, as text.

    Args:
        items: names and labels.
        about: the rest, which JSON can store; its key `KEY` is left out.
    """
    rest = {name: value for name, value in about.items() if name != KEY}
    crc = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    crc = zlib.crc32(items.labels.cpu().numpy().astype("<i8").tobytes(), crc)
    return as_text(zlib.crc32(encode_names(items.names), crc))
