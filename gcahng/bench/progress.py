"""A progress bar on standard error that needs no other package."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_WIDTH = 30


class ProgressBar:
    """Shows how much work is done. It is silent unless standard error is a terminal. Use it as a context manager."""

    def __init__(self, total: int) -> None:
        self._total, self._done = max(1, total), 0
        self._start = time.monotonic()
        self._shows = sys.stderr.isatty()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shows:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def doing(self, what: str) -> None:
        """Show what comes next."""
        if self._shows:
            full = _WIDTH * self._done // self._total
            passed = time.monotonic() - self._start
            left = f", {passed * (self._total - self._done) / self._done:.0f} s left" if self._done else ""
            bar = "█" * full + "·" * (_WIDTH - full)
            sys.stderr.write(f"\r\x1b[K{bar} {self._done}/{self._total}, {passed:.0f} s{left}  {what}")
            sys.stderr.flush()

    def done(self) -> None:
        """Count one piece of work as done."""
        self._done += 1
