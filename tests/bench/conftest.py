"""The folders of what the tests of benchmarks/gpu.py and of tests/gpu import."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "benchmarks", ROOT / "tests" / "gpu", ROOT / "tests" / "engine", ROOT / "tests" / "golden"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
