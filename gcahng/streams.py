"""Standard output and standard error of the command line, which may be closed, full, or read by nobody.

A command that cannot print still finishes what it writes to disk. So nothing that prints fails here: after the first
error a stream takes what is written and keeps none of it, and the error is told when the command has ended.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

# The exit status of a program that SIGPIPE (13) ends, which `gcahng … | head` is to look like.
BROKEN_PIPE = 128 + 13


class Output(io.TextIOWrapper):
    """A text stream whose writes never fail.

    Args:
        stream: takes the text until it fails; None: there is none, because its descriptor is closed.
        descriptor: of the stream, used where `stream` is None.

    Attributes:
        error: the first error of writing; None so far.
    """

    def __init__(self, stream: io.TextIOWrapper | None, descriptor: int) -> None:
        self._stream = stream  # which would be closed with its last reference
        if stream is None:
            closed = OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._sink = _Sink(io.FileIO(descriptor, "wb", closefd=False), closed)
            how: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
        else:
            stream.flush()
            self._sink = _Sink(getattr(stream.buffer, "raw", stream.buffer))
            how = {name: getattr(stream, name) for name in ("encoding", "errors", "line_buffering", "write_through")}
        super().__init__(io.BufferedWriter(self._sink), **how)

    @property
    def error(self) -> OSError | None:
        return self._sink.error


class _Sink(io.RawIOBase):
    """Passes bytes on until that fails, and then drops them."""

    def __init__(self, raw: IO[bytes] | io.RawIOBase, missing: OSError | None = None) -> None:
        self._raw, self._missing = raw, missing
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self._missing is not None:
            self.error = self._missing
        while self.error is None:
            try:
                written = self._raw.write(data)
                if written is not None:
                    return written
                select.select([], [self._raw], [])  # a pipe that does not block, and is full
            except OSError as error:
                self.error = error
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()


class Streams:
    """Standard output and standard error while a command runs, and what has become of them."""

    def __init__(self) -> None:
        self.both = _never_failing(sys.stdout, 1), _never_failing(sys.stderr, 2)

    def status(self, status: int) -> int:
        """The exit status of a command, after a line about a standard output that could not be written.

        Args:
            status: what the command ends with; 0: well.

        Returns:
            `status`, or where something could not be printed at least 2; `BROKEN_PIPE` where nobody reads the output.
        """
        self.flush()
        out, err = self.both
        lost = getattr(out, "error", None)
        if isinstance(lost, BrokenPipeError):
            return BROKEN_PIPE if status < 2 else status
        if lost is not None:
            reason = "is closed" if lost.errno == errno.EBADF else f"cannot be written: {lost.strerror or lost}"
            print(f"gcahng: error: standard output {reason}", file=err, flush=True)
        return status if lost is None and getattr(err, "error", None) is None else max(status, 2)

    def flush(self) -> None:
        for stream in self.both:
            stream.flush()


@contextmanager
def standard_streams() -> Iterator[Streams]:
    """A context in which nothing that prints fails, and no file that is opened takes the place of a closed stream."""
    _open_descriptors()
    before = sys.stdout, sys.stderr
    streams = Streams()
    sys.stdout, sys.stderr = streams.both
    try:
        yield streams
    finally:
        streams.flush()
        sys.stdout, sys.stderr = before


def nobody_reads(stream: object) -> bool:
    """Whether the reader of a stream has gone, as in `gcahng … | head`."""
    return isinstance(getattr(stream, "error", None), BrokenPipeError)


def _open_descriptors() -> None:
    """Open the null device in the place of each standard descriptor that is closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest that is free, so `descriptor`
            os.set_inheritable(nowhere, True)


def _never_failing(stream: Any, descriptor: int) -> Any:
    # A file's name may hold characters that the terminal's encoding lacks, or bytes that are no text.
    if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    if stream is None or type(stream) is io.TextIOWrapper:
        return Output(stream, descriptor)
    return stream  # a notebook's, or what a test has put in its place


def print_line(text: str) -> None:
    """Print one line on standard error. Names of files may have characters that would move the cursor.

    torchrun shows it again at its end, as the reason why this process failed.
    """
    line = re.sub(r"\s*[\r\n]+\s*", " ", text).strip()
    printable = "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else ascii(c)[1:-1] for c in line)
    print(f"gcahng: {printable}", file=sys.stderr, flush=True)
    if for_torchrun := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError), open(for_torchrun, "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump({"message": {"message": printable, "extraInfo": {"timestamp": str(int(time.time()))}}}, file)
