"""Prints and writes the rows that scripts in benchmarks/ measure."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gcahng.bench.system import describe, settings
from gcahng.errors import UserError


def show(
    script: str, head: str, rows: Iterable[dict[str, Any]], text: Callable[[dict[str, Any]], str], file: str | None
) -> int:
    """Print the settings and a Markdown table, row by row as they are measured, and write both as JSON.

    Args:
        script: name of the script, for the message of a UserError.
        head: first line of the table.
        rows: the rows, which are measured while this iterates over them.
        text: formats a row as a line of the table.
        file: path of the JSON file; None writes none.

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
