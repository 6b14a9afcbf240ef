"""The cases that these tests share with those on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
for folder in ("engine", "golden", "processes", "."):
    if str(TESTS / folder) not in sys.path:
        sys.path.append(str(TESTS / folder))
