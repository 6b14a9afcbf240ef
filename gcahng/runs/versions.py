"""The versions that a run was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

import gcahng


def versions() -> dict[str, str]:
    """The versions of gcahng and of what can change a run's numbers, by name."""
    numbers = {
        "gcahng": gcahng.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    if torch.version.cuda is not None:
        numbers["cuda"] = torch.version.cuda
    for package in ("matplotlib", "pytorch-metric-learning"):
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            continue
    return numbers
