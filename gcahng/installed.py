"""How this gcahng got here, what its build said, and the command that builds it again. Nothing here needs torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import struct
import sys
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RECORD = "_native_build.json"  # setup.py writes it
_MACHINES = {62: ("x86_64", "AMD64", "amd64"), 183: ("aarch64", "arm64")}  # numbers in the header of an ELF file


def record() -> dict[str, Any]:
    """What the build of this installation recorded for each library: how it was built, or why it was left out.

    Returns:
        By library: its size, hash, compiler and flags, or the reason. Empty if nothing was built here.
    """
    try:
        facts = json.loads((FOLDER / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    # Builds of gcahng 0.1.0 from before wheels were published recorded the reason alone.
    return {name: fact if isinstance(fact, dict) else {"reason": fact} for name, fact in facts.items()}


@cache
def source_digest() -> str:
    """A digest of the Python source of this gcahng, which tells two of one version apart."""
    digest = hashlib.sha256()
    # rglob does not follow the link to kernels/ in a checkout.
    for path in sorted({*FOLDER.rglob("*.py"), *(FOLDER / "kernels").glob("*.py")}):
        digest.update(f"{path.relative_to(FOLDER).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def source_folder() -> Path | None:
    """The source folder that this gcahng runs from (a checkout, or an editable install), or None."""
    return FOLDER.parent if all((FOLDER.parent / name).is_file() for name in ("setup.py", "CMakeLists.txt")) else None


def hidden() -> Path | None:
    """Another gcahng with native libraries on this interpreter's path, which this one hides; None if there is none."""
    for entry in sys.path:
        folder = Path(entry or ".").resolve() / "gcahng"
        if folder != FOLDER and any(folder.glob("_C_*.so")):
            return folder
    return None


def origin() -> dict[str, str]:
    """The installer and the source of this gcahng, as its metadata have it.

    Returns:
        "kind": "source folder", "copy" (neither was installed), "editable", "folder", "archive", "wheel" or "index";
        "from": a path or URL, where there is one; "installer": pip, uv, …
    """
    found = _distribution()
    if found is None:
        kind = "source folder" if source_folder() else "copy"
        return {"kind": kind, "from": str(FOLDER.parent), "installer": "none"}
    installer = (found.read_text("INSTALLER") or "unknown").strip()
    direct = json.loads(found.read_text("direct_url.json") or "null")
    if direct is None:
        return {"kind": "index", "from": "", "installer": installer}
    url = str(direct.get("url", ""))
    kind = "wheel" if url.endswith(".whl") else "archive"
    if "dir_info" in direct:
        kind = "editable" if direct["dir_info"].get("editable") else "folder"
    if url.startswith("file://"):
        from urllib.parse import unquote, urlsplit

        url = unquote(urlsplit(url).path)
    return {"kind": kind, "from": url, "installer": installer}


def build_command() -> str:
    """The command that builds gcahng again where it is installed, and fails rather than leave a library out.

    pip and uv keep a wheel that they have built, and look at nothing but its name and tags before they install it
    again. So the command makes them build anew.
    """
    source = origin()
    if (folder := source_folder()) and source["kind"] in ("source folder", "editable"):
        if source["kind"] == "source folder":
            return f"cd {shlex.quote(str(folder))} && GCAHNG_NATIVE=require python setup.py build_ext --inplace"
        what = ["-e", source["from"]]
    elif source["kind"] in ("folder", "archive"):
        what = [source["from"]]
    else:
        found = _distribution()
        what = ["--no-binary", "gcahng", f"gcahng=={found.version}" if found else "gcahng"]
    if source["installer"] == "uv":
        command = ["uv", "pip", "install", "--python", sys.executable, "--no-cache", "--reinstall-package", "gcahng"]
    else:
        command = [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--force-reinstall"]
    return f"GCAHNG_NATIVE=require {shlex.join([*command, '--no-deps', *what])}"


def why_missing(name: str) -> str:
    """Why a library's file is not there, and the remedy, in one line."""
    reason = record().get(name, {}).get("reason")
    if reason is None and source_folder() and (other := hidden()):
        return (
            f"{FOLDER} is a source folder that hides the gcahng installed in {other}, because Python looks in the "
            "folder where it is started first; start it elsewhere, or use the command gcahng, not python -m gcahng"
        )
    if reason is None and name in record():
        return f"it was there after the build and is gone; run: {build_command()}"
    if reason is None:
        return f"nothing was built in {FOLDER}; run: {build_command()}"
    if reason == "there is no native code for Windows":
        return f"at build time: {reason}"
    return f"at build time: {reason}; to build it, run: {build_command()}"


@cache
def say_once() -> None:
    """Logs, once in a process, that this is pure Python although it need not be.

    GCAHNG_NATIVE=0 in the environment says that it is meant so. Workers and further ranks leave it to the first.
    """
    if sys.platform == "win32" or (FOLDER / "_C_cpu.so").exists() or os.environ.get("GCAHNG_NATIVE") == "0":
        return
    multiprocessing = sys.modules.get("multiprocessing")
    if (multiprocessing and multiprocessing.parent_process()) or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    logging.getLogger("gcahng").warning("gcahng runs without its C++ library, slower: %s", why_missing("_C_cpu"))


def damage(path: Path) -> str | None:
    """What is wrong with a library's file, or None. To load a file that is cut off would kill the process.

    Args:
        path: a file that exists.

    Returns:
        In words that continue "_C_cpu.so …".
    """
    content = path.read_bytes()
    if reason := _misfit(content):
        return reason
    built = record().get(path.stem, {})
    if built.get("size") != len(content):
        return None  # complete, but changed on purpose: packagers strip libraries, for example
    if built.get("sha256") != hashlib.sha256(content).hexdigest():
        return "has other content than what was built: it is damaged"
    return None


def _misfit(content: bytes) -> str | None:
    """What the header of a library says against loading it; None for what is no 64-bit ELF file, too."""
    if content[:6] != b"\x7fELF\x02\x01":
        return None if content else "is empty"
    if len(content) < 64:
        return f"is cut off after {len(content)} bytes"
    machine = struct.unpack_from("<H", content, 18)[0]
    if machine in _MACHINES and platform.machine() not in _MACHINES[machine]:
        return f"is for {_MACHINES[machine][0]}, and this machine is {platform.machine()}"
    segments, sections = struct.unpack_from("<QQ", content, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<HHHH", content, 54)
    end = max(segments + segment_size * segment_count, sections + section_size * section_count)
    if segments + segment_size * segment_count <= len(content):
        for k in range(segment_count):
            offset, _, _, size = struct.unpack_from("<QQQQ", content, segments + segment_size * k + 8)
            end = max(end, offset + size)
    return f"is cut off: it has {len(content)} bytes of {end}" if end > len(content) else None


def _distribution() -> importlib.metadata.Distribution | None:
    """The metadata of this gcahng; None if this one was never installed."""
    for found in importlib.metadata.distributions(name="gcahng"):
        direct = json.loads(found.read_text("direct_url.json") or "{}")
        editable = direct.get("dir_info", {}).get("editable")
        here = (
            Path(str(direct.get("url", "")).removeprefix("file://")) if editable else Path(str(found.locate_file("")))
        )
        if here.resolve() == FOLDER.parent and found.read_text("INSTALLER"):
            return found
    return None
