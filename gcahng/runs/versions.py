"""What a run was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

import gcahng


def versions() -> dict[str, str]:
    """Versions of gcahng and of what can change a run's numbers."""
    found = {
        "gcahng": gcahng.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for package in ("matplotlib", "pytorch-metric-learning"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
