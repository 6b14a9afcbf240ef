"""Rows of embeddings on the disk while they are not all there yet, and whose they are."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gcahng.data import ImageFiles, LabeledImages
from gcahng.errors import UserError
from gcahng.files import lock, regular_file, sync, write_json, writing
from gcahng.retrieval import checksums

# Seconds between two notes of how many rows there are; a kill loses at most as much work.
_NOTE_EVERY = 5.0


class ImagesKey:
    """A digest that two calls must share so that the second one may continue with the rows of the first one.

    It holds the path, the size and the time of change of image files, the pixels of images in memory, and their labels.

    Args:
        about: the network and the options.
        images: what is embedded.
    """

    def __init__(self, about: str, images: LabeledImages) -> None:
        self._digest = hashlib.sha256(about.encode())
        self._images, self._done = images, 0

    def of_first(self, count: int) -> str:
        """The digest of the first `count` images, not fewer than in an earlier call; later images may still change."""
        images = self._images
        for i in range(self._done, min(count, len(images))):
            if isinstance(images, ImageFiles):
                file = images.file(i).absolute()
                try:
                    stat = file.stat()
                    seen = f"{stat.st_size} {stat.st_mtime_ns}"
                except OSError:
                    seen = "missing"
                self._digest.update(f"{file}\0{seen}\0{int(images.labels[i])}\0".encode("utf-8", "surrogateescape"))
            else:
                self._digest.update(images.images[i].cpu().contiguous().numpy())
                self._digest.update(f"{int(images.labels[i])}\0".encode())
        self._done = max(self._done, count)
        return self._digest.hexdigest()


@dataclass
class _Note:
    """What the .part.json holds.

    Attributes:
        key: of the images that are done.
        rows: how many rows are on the disk.
        dim: their channels.
        images: how many images are done.
        skipped: the places of those that were left out.
        crc32: checksum of the rows; None in a note of an earlier version.
    """

    key: str = ""
    rows: int = 0
    dim: int = 0
    images: int = 0
    skipped: list[int] = field(default_factory=list)
    crc32: int | None = 0


class PartialRows:
    """X.part, which holds raw float32 rows, and X.part.json, the note of how many are safe. Use as a context manager.

    Args:
        out: X.
        key: of the images that are embedded.

    Raises:
        UserError: on entering, the files were made from other images, are damaged or are being written by another
            process; at any time, they cannot be written.
    """

    def __init__(self, out: Path, key: ImagesKey) -> None:
        self._path = out.with_name(f"{out.name}.part")
        self._note_path = out.with_name(f"{out.name}.part.json")
        self._key, self._note = key, _Note()
        self._file: BinaryIO | None = None

    @property
    def rows_done(self) -> int:
        """How many rows are on the disk."""
        return self._note.rows

    @property
    def images_done(self) -> int:
        """How many images are done, including those that were left out."""
        return self._note.images

    @property
    def skipped(self) -> list[int]:
        """The places of the images that were left out."""
        return self._note.skipped

    def __enter__(self) -> PartialRows:
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self._path, "ab")  # closed below or by __exit__
            try:
                lock(file, self._path, "written")
                if self._note_path.is_file():
                    self._note = self._read_note()
                noted = 4 * self._note.rows * self._note.dim
                if self._path.stat().st_size < noted:
                    raise UserError(f"{self._path} is shorter than {self._note_path.name} says; remove both")
                file.truncate(noted)  # what came after the last note may be torn
                self._file = file
                self._check_rows()
            except BaseException:
                file.close()
                self._file = None
                raise
        self._noted = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self.note()
            self._file.close()

    def append(self, rows: Tensor, skipped: list[int], images: int) -> None:
        """Write rows.

        Args:
            rows: (b, D).
            skipped: the places of the images that were left out among theirs.
            images: how many images are done then.
        """
        note = self._note
        with writing(self._path):
            values = np.ascontiguousarray(rows.numpy(), dtype="<f4")
            self._opened.write(values.data)
        if note.crc32 is not None:
            note.crc32 = checksums.with_rows(note.crc32, values)
        note.rows += len(rows)
        note.dim = note.dim or rows.shape[1]
        note.images = images
        note.skipped += skipped
        if time.monotonic() - self._noted >= _NOTE_EVERY:
            self.note()

    def note(self) -> str:
        """Bring the rows to the disk and note that they are there; returns the key of the images that are done."""
        with writing(self._path):
            self._opened.flush()
            sync(self._opened, self._path)
            self._note.key = self._key.of_first(self._note.images)
            write_json(self._note_path, asdict(self._note))
        self._noted = time.monotonic()
        return self._note.key

    def rows(self) -> Tensor:
        """All rows (n, D), mapped into memory.

        Raises:
            UserError: they are no longer what was written.
        """
        self._opened.flush()
        self._check_rows()
        return self._mapped()

    def _mapped(self) -> Tensor:
        # Copy on write, because PyTorch warns of arrays that cannot be written to.
        return torch.from_numpy(np.memmap(self._path, "<f4", "c", shape=(self._note.rows, self._note.dim)))

    def remove(self) -> None:
        """Delete both files."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._note_path.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)

    @property
    def _opened(self) -> BinaryIO:
        assert self._file is not None, "used outside its context"
        return self._file

    def _check_rows(self) -> None:
        """Compare the rows on the disk with their checksum."""
        if self._note.rows and self._note.crc32 is not None:
            found = reduce(checksums.with_rows, checksums.rows_as_bytes(self._mapped()), 0)
            if found != self._note.crc32:
                raise UserError(
                    f"{self._path} is damaged: the checksum of its rows is {found:08x}; it must be "
                    f"{self._note.crc32:08x}; remove it and {self._note_path.name}"
                )

    def _read_note(self) -> _Note:
        try:
            about = json.loads(regular_file(self._note_path).read_text())
            note = _Note(**{"crc32": None} | about)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self._note_path} is damaged; remove it and {self._path.name}") from error
        if note.key != self._key.of_first(note.images):
            raise UserError(
                f"{self._path} was made from other images, another network or other options; remove it and "
                f"{self._note_path.name}, or give another out"
            )
        return note
