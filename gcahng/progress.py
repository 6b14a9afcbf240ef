"""What long work calls to say how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Called with how much is done, and how much there is to do.
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """The `Progress` of work that nobody watches."""
