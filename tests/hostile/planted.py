"""Cases that commit faults themselves, so that tests see the harness find them. Each has the name of its fault."""

from __future__ import annotations

import ctypes
import time
from typing import Any

from hostile import case as manners
from hostile.case import Case, Fault


def _crash(case: Case) -> str:
    ctypes.string_at(0)
    return manners.FINE


def _hang(case: Case) -> str:
    time.sleep(10**6)
    return manners.FINE


def _traceback(case: Case) -> str:
    nothing: list[Any] = []
    manners.refused(lambda: nothing[1])
    return manners.FINE


def _memory(case: Case) -> str:
    manners.refused(lambda: bytearray(1 << 34))
    return manners.FINE


def _manners(case: Case) -> str:
    manners.ended(2, "", "gcahng: error: one line\nand another\n")
    return manners.FINE


def _wrong(case: Case) -> str:
    raise Fault("wrong", "2 and 2 are 5")


def _half_changed(case: Case) -> str:
    manners.unchanged({"a": b"1"}, {"a": b"2"})
    return manners.FINE


def _half_written(case: Case) -> str:
    (case.folder / ".x.1.tmp").write_bytes(b"x")
    manners.no_temporaries(case.folder)
    return manners.FINE


ACTIONS = {
    "crash": _crash,
    "hang": _hang,
    "traceback": _traceback,
    "memory": _memory,
    "manners": _manners,
    "wrong": _wrong,
    "half-changed": _half_changed,
    "half-written": _half_written,
}
