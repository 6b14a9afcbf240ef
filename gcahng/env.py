"""What a bug report needs: what is installed, how it was built, the machine, and what runs here (`gcahng env`)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from gcahng import dispatch, installed, machine, native
from gcahng.bench import system
from gcahng.bounds import format_bytes
from gcahng.errors import UserError
from gcahng.extras import faiss_missing

PACKAGES = (
    "numpy",
    "triton",
    "faiss-cpu",
    "faiss-gpu",
    "torchvision",
    "timm",
    "matplotlib",
    "jsonargparse",
    "pytorch-metric-learning",
    "scikit-learn",
    "tensorboard",
    "safetensors",
)

# Environment variables that change what is built or what runs. Others are nobody's business.
VARIABLES = (
    "GCAHNG_",
    "TORCH",
    "PYTORCH_",
    "TRITON_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "OMP_",
    "MKL_",
    "KMP_",
    "CMAKE_ARGS",
    "CXX",
    "CUDACXX",
    "MAX_JOBS",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "PYTHONPATH",
)
SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def collect() -> dict[str, Any]:
    """Versions, devices, native libraries, and for CPU and CUDA each implementation or why it is not available.

    It also says what impl="auto" takes for the loss and for each public op, and why nothing better runs. It loads the
    native libraries and, if it is installed, faiss.

    Returns:
        Sections by title; a section is a dict of texts, numbers, lists of texts or further such dicts, ready for JSON.
    """
    return {
        "versions": _versions(),
        "machine": _machine(),
        "packages": {name: _version(name) for name in PACKAGES},
        "libraries": {name: _library(name) for name in native.NAMES},
        "implementations": {device: _implementations(device) for device in ("cpu", *_gpus())},
        "auto": _choices(),
        "environment": _variables(),
        "notes": _notes(),
    }


def report() -> str:
    """What `collect` finds, as text without a final newline."""
    found = collect()
    packages = {name: version or "not installed" for name, version in found["packages"].items()}
    lines = [*_table(found["versions"] | packages), "", "Machine", *_table(found["machine"])]
    lines += ["", "Native libraries", *_table(_library_rows(found["libraries"]))]
    for device, reasons in found["implementations"].items():
        rows = {name: "available" if reason is None else f"not available: {reason}" for name, reason in reasons.items()}
        lines += ["", f"Implementations on {device.upper()}", *_table(rows)]
    lines += ["", "impl='auto' chooses", *_table(found["auto"])]
    if found["environment"]:
        lines += ["", "Environment variables", *_table(found["environment"])]
    if found["notes"]:
        lines += ["", "Notes", *(f"  {note}" for note in found["notes"])]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    import gcahng

    source = installed.origin()
    place = f" from {source['from']}" if source["from"] else ""
    how = f"{source['kind']}{place}, installer {source['installer']}"
    return {
        "gcahng": f"{gcahng.__version__} in {installed.FOLDER} ({how})",
        "Python": f"{platform.python_version()} ({platform.python_implementation()}) at {sys.executable}",
        "torch": f"{torch.__version__} in {Path(torch.__file__).parent}, {_cuda_build()}",
    }


def _cuda_build() -> str:
    if torch.version.cuda is None:
        return "built without CUDA"
    return f"built with CUDA {torch.version.cuda}{'' if torch.cuda.is_available() else ', sees no CUDA device'}"


def _machine() -> dict[str, str]:
    memory = machine.usable_memory()
    rows = {
        "system": platform.platform(),
        "C library": " ".join(platform.libc_ver()).strip() or "unknown",
        "processor": system.cpu_model(),
        "CPUs": f"{machine.usable_cpus()} usable of {os.cpu_count()}; torch uses {torch.get_num_threads()} threads",
        "instruction set": native.cpu_arch() or "none: no _C_cpu",
        "free memory": "unknown" if memory is None else format_bytes(memory),
    }
    if driver := _driver():
        rows["NVIDIA driver"] = driver
    for k in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(k)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        rows[f"GPU {k}"] = f"{gpu.name}, {capability}, {format_bytes(gpu.total_memory)}"
    return rows


def _driver() -> str:
    """The version of NVIDIA's driver, or an empty text."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].removeprefix("NVRM version: ").strip()
    except (OSError, IndexError):
        return system.card().get("driver", "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _library(name: native.Name) -> dict[str, Any]:
    """A library's file or why it does not load, and how it was built."""
    library = native.load(name)
    file = installed.FOLDER / f"{name}.so"
    facts: dict[str, Any] = {"path": str(library.path or "") or None, "not loaded": library.reason}
    if file.exists():
        content = file.read_bytes()
        facts |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    built = installed.record().get(name, {})
    if "sha256" in built:
        facts["as built"] = facts.get("sha256") == built["sha256"]
    return facts | {key: built[key] for key in ("compiler", "flags", "system", "cmake", "cuda") if key in built}


def _library_rows(libraries: dict[str, dict[str, Any]]) -> dict[str, str]:
    rows = {}
    for name, facts in libraries.items():
        rows[name] = facts["path"] or f"not loaded: {facts['not loaded']}"
        if "size" in facts:
            same = {True: ", as built", False: ", not as built", None: ""}[facts.get("as built")]
            rows[f"{name} file"] = f"{facts['size']} bytes, sha256 {facts['sha256'][:16]}…{same}"
        if "compiler" in facts:
            cuda = f"CUDA {facts['cuda']}, torch's is {torch.version.cuda or 'none'}, " if "cuda" in facts else ""
            rows[f"{name} build"] = (
                f"{cuda}{facts['compiler']} on {facts['system']}, CMake {facts['cmake']}: {facts['flags']}"
            )
    return rows


def _gpus() -> list[str]:
    """CUDA as one device, or each GPU where they differ: what runs on one need not run on another."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    capabilities = {torch.cuda.get_device_capability(k) for k in range(count)}
    return ["cuda"] if len(capabilities) < 2 else [f"cuda:{k}" for k in range(count)]


def _implementations(device: str) -> dict[str, str | None]:
    """Why each implementation is not available; None where it is."""
    return {name: dispatch.available(name, device) for name in dispatch.NAMES}


def _choices() -> dict[str, str]:
    has_some = [d for d in ("cpu", *_gpus()) if any(dispatch.available(name, d) is None for name in dispatch.NAMES)]
    return {f"{what} on {device}": _choice(what, device) for device in has_some for what in dispatch.WHATS}


def _choice(what: str, device: str) -> str:
    """What "auto" takes, and why nothing better runs."""
    try:
        found, passed = dispatch.choose("auto", device, what=what)
        asked = device != "cpu" and dispatch.auto_asks()
    except UserError as error:
        return f"none ({error})"
    return "; not ".join([f"{found} (as {dispatch.AUTO} asks)" if asked else found, *passed])


def _variables() -> dict[str, str]:
    """The environment variables that matter here. A report is made public, so none that may hold a secret is shown."""
    names = [name for name in sorted(os.environ) if name.startswith(VARIABLES)]
    return {name: os.environ[name] for name in names if not any(secret in name for secret in SECRETS)}


def _notes() -> list[str]:
    """What is wrong with this environment and is no matter of one implementation."""
    notes = []
    both = [name for name in ("faiss-cpu", "faiss-gpu") if _version(name)]
    if len(both) == 2:
        notes.append(
            "faiss-cpu and faiss-gpu are both installed, into the same folder: which one runs depends on their order, "
            "and removing one breaks the other; pip uninstall -y faiss-cpu faiss-gpu, then install one"
        )
    if both and (reason := faiss_missing()):
        notes.append(reason)
    if installed.source_folder() and (other := installed.hidden()):
        notes.append(f"this source folder hides the gcahng that is installed in {other}")
    return notes


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {text}" for name, text in rows.items()]
