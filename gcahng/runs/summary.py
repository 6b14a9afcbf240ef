"""The summary of a finished run, summary.json, read back and checked."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any, NoReturn

from gcahng.errors import UserError
from gcahng.files import regular_file

SUMMARY = "summary.json"
# What other code takes from a summary.
_NUMBERS = ("steps", "seconds", "left_out", "unreadable")
_TEXTS = ("loss", "data_digest")


def read_summary(run: Path) -> dict[str, Any] | None:
    """The summary of a run; None if the run has none, and so has not finished.

    Args:
        run: the run folder; other paths have no summary.

    Raises:
        UserError: the file is damaged or cannot be read; names the line and what to do.
    """
    path = run / SUMMARY
    try:
        content = regular_file(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; it must be a readable file") from None
    try:
        summary = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        _refuse(run, f"line {_line(content, error.start)} is not UTF-8")
    except json.JSONDecodeError as error:
        _refuse(run, f"line {error.lineno} is not JSON ({error.msg})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        _refuse(run, f"it is not JSON ({type(error).__name__})")
    if (wrong := _wrong(summary)) is not None:
        _refuse(run, f"it has no valid {wrong!r}")
    return summary


def _line(content: bytes, place: int) -> int:
    return content.count(b"\n", 0, place) + 1


def _refuse(run: Path, reason: str) -> NoReturn:
    raise UserError(
        f"{run / SUMMARY} cannot be read: {reason}; remove it, and gcahng train --resume {shlex.quote(str(run))} "
        "writes it again from the last checkpoint"
    )


def _wrong(summary: Any) -> str | None:
    """The first field that is missing or has another type; None: there is none."""
    if not isinstance(summary, dict):
        return "test"
    for name in _NUMBERS:
        if not _is_number(summary.get(name)):
            return name
    for name in _TEXTS:
        if not isinstance(summary.get(name), str):
            return name
    best = summary.get("best")
    if not isinstance(best, dict) or (best and not _is_number(best.get("step"))):
        return "best"
    needed = ["test", "test_best"] if best and best["step"] != summary["steps"] else ["test"]
    tables = {name: summary.get(name) for name in needed}
    for name, table in tables.items():
        if not isinstance(table, dict) or not table or not all(map(_is_number, table.values())):
            return name
    return "test_best" if any(table.keys() != tables["test"].keys() for table in tables.values()) else None


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 2**63 and math.isfinite(value)
