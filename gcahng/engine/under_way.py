"""Gradients of weights whose sums over all processes are completed while the next sweep runs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gcahng.engine.schedule import Schedule


class UnderWay:
    """The weights' gradients that a sweep has added up. No sweep after it needs them, so none waits for them.

    Args:
        schedule: the tiles of the sweeps.
        into: gradients by the parameters' names, to which those that are complete are added.
    """

    def __init__(self, schedule: Schedule, into: dict[str, Tensor]) -> None:
        self._schedule, self._into = schedule, into
        self._waiting: list[tuple[Callable[[], None], Callable[[], dict[str, Tensor]]]] = []

    def add(self, sums: tuple[Tensor, ...], named: Callable[[], dict[str, Tensor]]) -> None:
        """Has sums completed.

        Args:
            sums: over this process's tiles. They must be left alone from now on.
            named: makes gradients by the parameters' names of them, once they are complete.
        """
        self._waiting.append((self._schedule.complete_later(*sums), named))
        if self._schedule.ranks is None:  # there is nothing to wait for, and the sums would take memory
            self.finish()

    def finish(self) -> None:
        """Waits for all sums and files their gradients."""
        for wait, named in self._waiting:
            wait()
            self._into |= named()
        self._waiting.clear()
