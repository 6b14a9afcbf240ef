"""What is installed, and which implementations run here: the text of `gcahng env`."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from gcahng import dispatch, native
from gcahng.errors import UserError

PACKAGES = (
    "numpy",
    "triton",
    "faiss-cpu",
    "faiss-gpu",
    "matplotlib",
    "jsonargparse",
    "pytorch-metric-learning",
    "scikit-learn",
    "tensorboard",
    "safetensors",
)


def report() -> str:
    """Versions, devices, native libraries, and for CPU and CUDA each implementation or why it is not available.

    It also says what impl="auto" takes for the loss and for each public op, and why nothing better runs.

    Text without a final newline. Loads the native libraries; imports no optional package.
    """
    lines = _table(_versions())
    lines += ["", "Native libraries", *_table(_libraries())]
    for device_type, title in (("cpu", "CPU"), ("cuda", "CUDA")):
        lines += ["", f"Implementations on {title}", *_table(_implementation_rows(device_type))]
    lines += ["", "impl='auto' chooses", *_table(_choices())]
    return "\n".join(lines)


def _versions() -> list[tuple[str, str]]:
    import gcahng

    rows = [
        ("gcahng", gcahng.__version__),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {_cuda_build()}, {torch.get_num_threads()} CPU threads"),
    ]
    rows += [(name, _version(name)) for name in PACKAGES]
    return rows


def _cuda_build() -> str:
    if torch.version.cuda is None:
        return "built without CUDA"
    if not torch.cuda.is_available():
        return f"CUDA {torch.version.cuda}, no CUDA device"
    names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return f"CUDA {torch.version.cuda}, {', '.join(names)}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _libraries() -> list[tuple[str, str]]:
    rows = []
    for name in native.NAMES:
        library = native.load(name)
        rows.append((name, str(library.path) if library.path else f"not loaded: {library.reason}"))
    rows.append(("instruction set", native.cpu_arch() or "none: no _C_cpu"))
    return rows


def _implementation_rows(device_type: str) -> list[tuple[str, str]]:
    rows = []
    for name in dispatch.NAMES:
        reason = dispatch.available(name, device_type)
        rows.append((name, "available" if reason is None else f"not available: {reason}"))
    return rows


def _choices() -> list[tuple[str, str]]:
    has_some = [d for d in dispatch.ORDER if any(dispatch.available(name, d) is None for name in dispatch.NAMES)]
    return [
        (f"{what} on {device_type}", _choice(what, device_type)) for device_type in has_some for what in dispatch.WHATS
    ]


def _choice(what: str, device_type: str) -> str:
    """What "auto" takes, and why nothing better runs."""
    try:
        found, passed = dispatch.choose("auto", device_type, what=what)
        asked = device_type == "cuda" and dispatch.auto_asks()
    except UserError as error:
        return f"none ({error})"
    return "; not ".join([f"{found} (as {dispatch.AUTO} asks)" if asked else found, *passed])


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows]
