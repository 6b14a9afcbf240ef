"""SIGINT and SIGTERM, which end a run at the end of a step."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from gcahng.processes.watch import ECHO


class StopSignals:
    """A context in which the first SIGINT or SIGTERM is only noted, so that the step can end. A second acts as usual.

    The same signal again within `ECHO` seconds is the first one: a terminal or a batch system signals all processes,
    and torchrun passes on the signal that it got itself.

    It does nothing outside the main thread, where Python allows no handlers.

    Attributes:
        received: the number of the signal; None before one has come.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._since = 0.0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
        elif number != self.received or now - self._since >= ECHO:
            self.__exit__()
            os.kill(os.getpid(), number)
