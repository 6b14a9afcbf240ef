"""What is said about a library that is missing, damaged or does not fit, and the command that helps."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gcahng import installed, native

REAL = installed.FOLDER / "_C_cpu.so"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package without libraries, at the end of the path."""
    package = tmp_path / "site" / "gcahng"
    package.mkdir(parents=True)
    monkeypatch.setattr(installed, "FOLDER", package)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    return package


def metadata(folder: Path, installer: str, direct: dict[str, object] | None = None) -> None:
    """Makes a package an installed one."""
    info = folder.parent / "gcahng-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gcahng\nVersion: 0.1.0\n")
    (info / "INSTALLER").write_text(f"{installer}\n")
    if direct:
        (info / "direct_url.json").write_text(json.dumps(direct))


def reason(name: native.Name = "_C_cpu") -> str:
    """Why a library does not load, asked anew."""
    found = native.load.__wrapped__(name)
    assert found.path is None and found.reason is not None
    return found.reason


def record(folder: Path, content: bytes) -> None:
    """Writes a library, and the record of its build."""
    (folder / "_C_cpu.so").write_bytes(content)
    facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / installed.RECORD).write_text(json.dumps({"_C_cpu": facts}))


PIP = f"GCAHNG_NATIVE=require {sys.executable} -m pip install --no-cache-dir --force-reinstall --no-deps"
UV = f"GCAHNG_NATIVE=require uv pip install --python {sys.executable} --no-cache --reinstall-package gcahng --no-deps"


@pytest.mark.parametrize(
    ("installer", "direct", "command"),
    [
        ("pip", None, f"{PIP} --no-binary gcahng gcahng==0.1.0"),
        ("pip", {"url": "file:///of/gcahng%201", "dir_info": {}}, f"{PIP} '/of/gcahng 1'"),
        ("pip", {"url": "https://x/gcahng-0.1.0.tar.gz", "archive_info": {}}, f"{PIP} https://x/gcahng-0.1.0.tar.gz"),
        ("pip", {"url": "file:///x/gcahng-0.1.0-py3-none-any.whl"}, f"{PIP} --no-binary gcahng gcahng==0.1.0"),
        ("uv", {"url": "file:///of/gcahng", "dir_info": {}}, f"{UV} /of/gcahng"),
        ("uv", None, f"{UV} --no-binary gcahng gcahng==0.1.0"),
    ],
)
def test_the_command_builds_from_where_it_came(
    folder: Path, installer: str, direct: dict[str, object] | None, command: str
) -> None:
    metadata(folder, installer, direct)
    assert installed.build_command() == command


def test_a_source_folder_and_an_editable_install_have_commands(folder: Path) -> None:
    for name in ("setup.py", "CMakeLists.txt"):
        (folder.parent / name).write_text("")
    build = "GCAHNG_NATIVE=require python setup.py build_ext --inplace"
    assert installed.build_command() == f"cd {folder.parent} && {build}"
    metadata(folder, "pip", {"url": f"file://{folder.parent}", "dir_info": {"editable": True}})
    assert installed.build_command() == f"{PIP} -e {folder.parent}"


def test_why_a_library_was_left_out_is_told(folder: Path) -> None:
    metadata(folder, "pip")
    assert reason() == f"_C_cpu was not built (nothing was built in {folder}; run: {installed.build_command()})"
    (folder / installed.RECORD).write_text('{"_C_cpu": {"reason": "no C++ compiler"}}')
    assert reason() == (
        f"_C_cpu was not built (at build time: no C++ compiler; to build it, run: {installed.build_command()})"
    )
    (folder / installed.RECORD).write_text('{"_C_cpu": "no cmake"}')  # as older builds recorded it
    assert "at build time: no cmake; to build it" in reason()
    (folder / installed.RECORD).write_text('{"_C_cpu": {"size": 3}}')
    assert "it was there after the build and is gone" in reason()


def test_a_source_folder_that_hides_an_installed_library_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("setup.py", "CMakeLists.txt"):
        (folder.parent / name).write_text("")
    assert "build_ext --inplace" in reason()
    other = tmp_path / "other" / "gcahng"
    other.mkdir(parents=True)
    (other / "_C_cpu.so").write_bytes(b"")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "other")])
    assert f"is a source folder that hides the gcahng installed in {other}" in reason()


def test_what_the_loader_says_is_shown(folder: Path) -> None:
    metadata(folder, "pip")
    (folder / "_C_cpu.so").write_bytes(b"not a library, but long enough to be read as one" * 9)
    assert f"_C_cpu.so does not load (invalid ELF header); run: {PIP}" in reason()


def test_a_function_that_torch_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "library.c"
    source.write_text("void torch_of_tomorrow(void); void start(void) { torch_of_tomorrow(); }")
    command = ["c++", "-x", "c", "-shared", "-fPIC", "-Wl,-z,now", str(source), "-o", str(folder / "_C_cpu.so")]
    subprocess.run(command, check=True)
    said = reason()
    assert "does not load (undefined symbol: torch_of_tomorrow)" in said
    assert f"torch {torch.__version__} lacks this function; install an official build of torch >= 2.10" in said


def test_an_old_torch_and_one_without_cuda_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in native.NAMES:
        (folder / f"{name}.so").write_bytes(b"")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason("_C_cuda").startswith(f"torch {torch.__version__} is built without CUDA")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert reason() == "torch is 2.9.1+cpu; it must be >= 2.10: pip install --upgrade 'torch>=2.10'"


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are no ELF files here")
def test_a_file_that_is_cut_off_is_never_loaded(folder: Path) -> None:
    """The loader would map what is not there, and the first look at it would kill the process (SIGBUS)."""
    metadata(folder, "pip")
    content = REAL.read_bytes()
    record(folder, content)
    assert installed.damage(folder / "_C_cpu.so") is None
    for length in (0, 17, 1000, len(content) // 2, len(content) - 1):
        (folder / "_C_cpu.so").write_bytes(content[:length])
        assert f"_C_cpu.so is {'cut off' if length else 'empty'}" in reason()
        assert reason().endswith(installed.build_command())
    (folder / installed.RECORD).unlink()  # the header tells by itself
    (folder / "_C_cpu.so").write_bytes(content[: len(content) // 2])
    assert f"is cut off: it has {len(content) // 2} bytes of {len(content)}" in reason()


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are no ELF files here")
def test_damage_is_told_from_what_packagers_do(folder: Path) -> None:
    content = REAL.read_bytes()
    record(folder, content)
    path = folder / "_C_cpu.so"
    hole = bytearray(content)
    hole[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    path.write_bytes(hole)
    assert installed.damage(path) == "has other content than what was built: it is damaged"
    path.write_bytes(content + b"signature")  # as a tool that strips or signs libraries leaves it
    assert installed.damage(path) is None
    other = bytearray(content)
    struct.pack_into("<H", other, 18, 183 if struct.unpack_from("<H", content, 18)[0] == 62 else 62)
    path.write_bytes(other)
    assert "and this machine is" in (installed.damage(path) or "")


def test_pure_python_is_told_once_and_only_where_it_helps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("GCAHNG_NATIVE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    say = installed.say_once.__wrapped__
    with caplog.at_level(logging.INFO, "gcahng"):
        (folder / "_C_cpu.so").write_bytes(b"")
        say()
        (folder / "_C_cpu.so").unlink()
        for variable, value in (("GCAHNG_NATIVE", "0"), ("LOCAL_RANK", "1")):
            with monkeypatch.context() as patch:
                patch.setenv(variable, value)
                say()
        assert not caplog.records
        say()
    (line,) = caplog.messages
    assert line.startswith("gcahng runs without its C++ library, slower: nothing was built")


@pytest.mark.parametrize(("driver", "fits"), [(12080, False), (13000, True), (13020, True), (14000, True), (0, True)])
def test_the_driver_must_know_the_cuda_of_the_build(
    folder: Path, monkeypatch: pytest.MonkeyPatch, driver: int, fits: bool
) -> None:
    """Without a driver (0) something else is amiss, which says so itself."""

    class Driver:
        @staticmethod
        def cuDriverGetVersion(version: object) -> int:
            version._obj.value = driver
            return 0

    monkeypatch.setattr(native.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    (folder / "_C_cuda.so").write_bytes(b"")
    (folder / installed.RECORD).write_text(json.dumps({"_C_cuda": {"cuda": "13.0.88"}}))
    said = (
        "_C_cuda is built with CUDA 13.0, and NVIDIA's driver knows CUDA up to 12.8; update it, or build with a CUDA 12"
    )
    assert (said in reason("_C_cuda")) == (not fits)
