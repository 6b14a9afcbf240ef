"""What the native libraries may and may not hold."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gcahng import native

CSRC = Path(__file__).resolve().parents[2] / "csrc"
WIDE = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]}


def defined_symbols(path: Path) -> list[tuple[str, str]]:
    """(kind, name) of every symbol that an object file defines."""
    listed = subprocess.run(
        ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    return [(kind, name) for kind, name in re.findall(r"^\S* (\S) (.*)$", listed, re.MULTILINE)]


def test_stems_are_listed_for_the_build() -> None:
    listed = dict(re.findall(r"set\((CPU|CUDA)_STEMS ([^)]*)\)", (CSRC.parent / "CMakeLists.txt").read_text()))
    others = {"dispatch", "probe"}
    assert sorted(listed["CPU"].split()) == sorted({p.stem for p in (CSRC / "cpu").glob("*.cpp")} - others)
    assert sorted(listed["CUDA"].split()) == sorted({p.stem for p in (CSRC / "cuda").glob("*.cu")} - others)
    for device in ("CPU", "CUDA"):
        bindings = (CSRC / "bindings" / device.lower()).glob("*.cpp")
        assert sorted(listed[device].split()) == sorted(p.stem for p in bindings)


@pytest.mark.processes
@pytest.mark.parametrize("arch", WIDE)
@pytest.mark.parametrize("stem", sorted(p.stem for p in (CSRC / "cpu").glob("*.cpp") if p.stem != "dispatch"))
def test_wide_code_cannot_leak_into_the_baseline(stem: str, arch: str, tmp_path: Path) -> None:
    """An inline function that the linker may merge would put AVX code where the baseline expects its own."""
    compiler = shutil.which("c++")
    assert compiler, "no C++ compiler"
    compiled = tmp_path / "stem.o"
    command = [
        compiler,
        "-std=c++20",
        "-O1",
        *WIDE[arch],
        f"-DGCAHNG_ARCH={arch}",
        "-c",
        str(CSRC / "cpu" / f"{stem}.cpp"),
    ]
    done = subprocess.run([*command, "-o", str(compiled)], capture_output=True, text=True)
    if "unrecognized command-line option" in done.stderr or "unsupported option" in done.stderr:
        pytest.skip("this processor's compiler has no such instructions")
    assert done.returncode == 0, done.stderr
    shared = [(kind, name) for kind, name in defined_symbols(compiled) if kind.isupper() or kind in "uvw"]
    assert shared == [("D", f"gcahng::{arch}::{stem}")], shared


@pytest.mark.parametrize("name", native.NAMES)
def test_libraries_hold_no_python_and_ask_for_little(name: native.Name) -> None:
    library = native.load(name)
    if library.path is None and "no nvcc" in (library.reason or ""):
        pytest.skip(library.reason)
    assert library.path is not None, library.reason
    listed = subprocess.run(["nm", "-DC", str(library.path)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r" U _?Py", listed)
    assert not re.search(r" U (c10|at)::", listed), "a symbol outside torch's stable ABI"
    exported = re.findall(r" [TDBRVWu] (.*)$", listed, re.MULTILINE)
    ours = {symbol for symbol in exported if "gcahng" in symbol or "torch" in symbol}
    called = {"_C_cpu": {"gcahng_cpu_arch", "gcahng_set_cpu_arch"}, "_C_cuda": {"gcahng_cuda_probe"}}
    assert ours == called[name]
