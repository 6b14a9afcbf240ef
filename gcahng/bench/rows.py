"""What the scripts in benchmarks/ do with rows as they are measured, and where numbers may be written."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gcahng.bench.system import describe, settings
from gcahng.errors import UserError


def show(
    script: str, head: str, rows: Iterable[dict[str, Any]], text: Callable[[dict[str, Any]], str], file: str | None
) -> int:
    """Prints the settings and a Markdown table, each line when its row is there, and writes both as JSON.

    Args:
        script: its name, for the one line of a UserError that ends the rows.
        head: the table's first line.
        rows: measured as they are asked for.
        text: a row's line.
        file: for the JSON; None: none.

    Returns:
        The exit status: 0, or 2 after a UserError.
    """
    print(describe(settings()))
    print(f"\n{head}\n|{'---|' * (head.count('|') - 1)}")
    shown = []
    try:
        for row in rows:
            shown.append(row)
            print(text(row), flush=True)
    except UserError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    if file:
        Path(file).write_text(json.dumps({"settings": settings(), "rows": shown}, indent=1) + "\n")
    return 0


def check_place(path: Path) -> None:
    """OSError for a file that cannot be written, before the minutes that its content takes."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()
