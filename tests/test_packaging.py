"""What gets installed: pure Python, what is said about libraries that are left out, and what is in wheel and sdist."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from installs import ROOT, SETTINGS


def setup_py(
    folder: Path, *arguments: str, python: Path | str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs setup.py; GCAHNG_* and compilers come from the arguments alone."""
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        [str(python), "setup.py", *arguments], cwd=folder, capture_output=True, text=True, env=inherited | environment
    )


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("gcahng: ")]


def only(folder: Path, *programs: str) -> str:
    """A PATH that holds these programs alone."""
    folder.mkdir()
    for program in programs:
        found = shutil.which(program)
        assert found, f"{program} is not installed"
        (folder / program).symlink_to(found)
    return str(folder)


def test_pure_python_wheel_holds_the_package(source: Path) -> None:
    done = setup_py(source, "bdist_wheel", GCAHNG_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert said(done) == [f"gcahng: {name} is left out: GCAHNG_NATIVE=0" for name in ("_C_cpu", "_C_cuda")]
    (wheel,) = (source / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = json.loads(archive.read("gcahng/_native_build.json"))
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
        (tags,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL"))
    assert record == dict.fromkeys(("_C_cpu", "_C_cuda"), {"reason": "GCAHNG_NATIVE=0"})
    assert "Root-Is-Purelib: true" in tags and "Tag: py3-none-any" in tags and "Build:" not in tags
    assert "gcahng = gcahng.cli:main" in entry_points
    expected = {f"gcahng/{path.relative_to(source / 'gcahng')}" for path in (source / "gcahng").rglob("*.py")}
    expected |= {f"gcahng/kernels/{path.name}" for path in (source / "kernels").glob("*.py")}
    expected |= {"gcahng/py.typed", "gcahng/_native_build.json", "gcahng/report/page.css", "gcahng/report/page.js"}
    recipes = {f"gcahng/recipes/{path.name}" for path in (source / "gcahng" / "recipes").glob("*.yaml")}
    assert len(recipes) >= 12
    expected |= recipes
    package = {name for name in names if ".dist-info/" not in name}
    assert package == expected


@pytest.mark.processes
def test_installed_wheel_imports_its_kernels(source: Path, tmp_path: Path) -> None:
    assert setup_py(source, "bdist_wheel", GCAHNG_NATIVE="0").returncode == 0
    (wheel,) = (source / "dist").glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = (
        "import gcahng.kernels, gcahng.kernels.configs, gcahng.native\n"
        "print(gcahng.__file__, gcahng.kernels.__file__, gcahng.native.load('_C_cpu').reason)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(installed)) == 2
    assert (
        "_C_cpu was not built (at build time: GCAHNG_NATIVE=0; to build it, run: GCAHNG_NATIVE=require " in done.stdout
    )
    assert done.stderr.count("gcahng runs without its C++ library") == 1
    meant = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"GCAHNG_NATIVE": "0"},
        capture_output=True,
        text=True,
    )
    assert meant.returncode == 0 and meant.stderr == ""


@pytest.mark.processes
def test_sdist_holds_all_sources(source: Path) -> None:
    done = setup_py(source, "sdist", GCAHNG_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (sdist,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "kernels", "third_party"):
        expected = {str(path.relative_to(source)) for path in (source / folder).rglob("*") if path.is_file()}
        assert expected <= names, expected - names
    assert {"CMakeLists.txt", "setup.py", "gcahng/py.typed", "gcahng/engine/stages/gate.py"} <= names
    assert "gcahng/recipes/resnet50_cub200.yaml" in names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_native_build.json"))]


@pytest.mark.processes
def test_without_a_compiler_the_wheel_is_pure_and_its_name_says_so(source: Path, tmp_path: Path) -> None:
    """pip and uv show no more of a build than the name."""
    path = only(tmp_path / "bin", "cmake")
    done = setup_py(source, "bdist_wheel", PATH=path)
    assert done.returncode == 0, done.stderr
    reason = "no C++ compiler; install g++ or clang++, or name one in CXX"
    assert said(done) == [f"gcahng: {name} is left out: {reason}" for name in ("_C_cpu", "_C_cuda")]
    assert done.stderr.rstrip().endswith(reason), "the reason has to be the last thing that is said"
    (wheel,) = (source / "dist").glob("*.whl")
    assert re.fullmatch(r"gcahng-[\d.]+-0_pure_python_no_compiler-py3-none-any\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read("gcahng/_native_build.json"))
        (tags,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
    assert record == dict.fromkeys(("_C_cpu", "_C_cuda"), {"reason": reason}) and "Root-Is-Purelib: true" in tags
    required = setup_py(source, "bdist_wheel", PATH=path, GCAHNG_NATIVE="require")
    assert required.returncode != 0 and f"_C_cpu is not built: {reason}" in required.stderr


@pytest.mark.processes
def test_with_a_compiler_nothing_is_left_out_without_failing(source: Path, tmp_path: Path) -> None:
    done = setup_py(source, "build_ext", "--inplace", PATH=only(tmp_path / "bin", "c++"))
    assert done.returncode != 0
    assert "_C_cpu is not built: no cmake; run `pip install cmake ninja`" in done.stderr
    assert "GCAHNG_NATIVE=0 installs gcahng without native libraries" in done.stderr
    wrong = setup_py(source, "build_ext", "--inplace", CXX="no-such-compiler")
    assert wrong.returncode != 0
    assert "CXX is 'no-such-compiler'; it must be a compiler on PATH, or the path of one" in wrong.stderr
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'broken-c++: error: planted' >&2\nexit 1\n")
    broken.chmod(0o755)
    (source / "gcahng" / "_C_cpu.so").write_bytes(b"of an earlier build")
    failed = setup_py(source, "build_ext", "--inplace", CXX=str(broken))
    assert failed.returncode != 0
    assert re.search(
        r"_C_cpu is not built: cmake failed \(The C\+\+ compiler .* simple test program.*planted\)", failed.stderr
    ), failed.stderr
    assert not (source / "gcahng" / "_C_cpu.so").exists(), "an old library must not stay in its place"


@pytest.mark.processes
def test_a_module_that_was_deleted_is_not_installed_again(source: Path) -> None:
    (source / "gcahng" / "gone.py").write_text("")
    assert setup_py(source, "build", GCAHNG_NATIVE="0").returncode == 0
    assert (source / "build" / "lib" / "gcahng" / "gone.py").exists() or list((source / "build").rglob("gone.py"))
    (source / "gcahng" / "gone.py").unlink()
    assert setup_py(source, "build", GCAHNG_NATIVE="0").returncode == 0
    assert not list((source / "build").rglob("gone.py"))


def test_setuptools_that_is_too_old_says_so(source: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "setuptools.py").write_text("__version__ = '65.5.0'\n")
    done = setup_py(source, "bdist_wheel", PYTHONPATH=str(tmp_path / "old"))
    assert done.returncode != 0
    assert done.stderr.strip() == (
        "gcahng: error: setuptools is 65.5.0; it must be >= 77: run `pip install -U setuptools`, or install without "
        "--no-build-isolation"
    )


def test_settings_are_checked(source: Path) -> None:
    done = setup_py(source, "build_ext", GCAHNG_NATIVE="yes")
    assert done.returncode != 0
    assert "GCAHNG_NATIVE is 'yes'; it must be unset, 0 or require" in done.stderr


# -- the functions of setup.py


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py, without a build."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def _torch(folder: Path, cuda: str) -> None:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(
        f"__version__ = '2.14.1+cpu'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = None\n"
    )


def test_no_cuda_library_beside_a_torch_without_cuda(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("nvcc", "cmake"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    configuration, LeftOut = script["configuration"], script["LeftOut"]
    _torch(tmp_path / "cpu", "None")
    _torch(tmp_path / "gpu", "'13.0'")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "gpu"), str(tmp_path / "cpu")])
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path / 'nvcc'}" in configuration("_C_cuda")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "cpu"), str(tmp_path / "gpu")])
    with pytest.raises(LeftOut, match=r"torch 2\.14\.1\+cpu is built without CUDA"):
        configuration("_C_cuda")
    monkeypatch.setenv("GCAHNG_CUDA", "require")
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path / 'nvcc'}" in configuration("_C_cuda")


def test_torch_is_looked_for_where_gcahng_will_be(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uv builds in an environment elsewhere, and VIRTUAL_ENV names the target."""
    folder = tmp_path / "env/lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    _torch(folder, "None")
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "env"))
    monkeypatch.setattr(sys, "path", [])
    assert str(folder) in script["site_folders"]()


@pytest.mark.parametrize(
    ("step", "output", "reason"),
    [
        (
            "the build",
            "[1/2] c++ -o error.o\na.cpp:3:1: error: first\nb.cpp:4: error: second\n",
            "a.cpp:3:1: error: first",
        ),
        (
            "cmake",
            "-- Found errors.h\nCMake Error at A.cmake:1 (message):\n  an earlier one\n\n"
            "CMake Error at CMakeLists.txt:9 (find_package):\n  Could not find\n  CUDAToolkit\n\n"
            "-- Configuring incomplete, errors occurred!\n",
            "Could not find CUDAToolkit",
        ),
        (
            "cmake",
            'CMake Error at T.cmake:5 (message):\n  The C++ compiler\n\n    "/c++"\n\n'
            "  is not able to compile a simple test program.\n\n  It fails with the following output:\n\n"
            "    [1/2] Building\n    cc1plus: error: bad value 'x' for '-march='\n\n  CMake will not be able.\n\n",
            'The C++ compiler "/c++" is not able to compile a simple test program. cc1plus: error: bad value',
        ),
        ("cmake", "Killed\n", None),
    ],
)
def test_the_reason_is_the_error_that_stopped_the_step(
    script: dict[str, Any], step: str, output: str, reason: str | None
) -> None:
    found = script["reason_of"](step, output)
    assert found == reason or (reason is not None and found.startswith(reason)), found


def _planted_build(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fails: int) -> list[str]:
    """Replaces the steps of a build; the first `fails` that compile find no memory. Returns the jobs of each."""
    jobs: list[str] = []

    def run(step: str, command: list[str]) -> None:
        if step == "the build":
            jobs.append(command[-1])
            if len(jobs) <= fails:
                raise MemoryError

    monkeypatch.setitem(script["build"].__globals__, "run", run)
    return jobs


def test_a_compiler_that_is_killed_is_tried_again_alone(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MemoryError):
        script["run"](
            "the build", ["sh", "-c", "echo 'c++: fatal error: Killed signal terminated program cc1plus'; exit 1"]
        )
    monkeypatch.setenv("MAX_JOBS", "4")
    jobs = _planted_build(script, monkeypatch, fails=2)
    with pytest.raises(script["LeftOut"], match="the compiler was killed.*memory runs out"):
        script["build"]("_C_cpu", [], tmp_path / "build", tmp_path)
    assert jobs == ["4", "1"]


def test_jobs_follow_processors_and_memory(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gcahng").mkdir()
    (tmp_path / "gcahng" / "_C_cuda.so").write_bytes(b"built")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "build.json").write_text('{"compiler": "GNU 12"}')
    jobs = _planted_build(script, monkeypatch, fails=0)
    for cpus, memory, expected in ((3, 64 << 30, "3"), (16, 9 << 30, "4"), (16, 1 << 20, "1"), (2, None, "2")):
        here = SimpleNamespace(usable_cpus=lambda cpus=cpus: cpus, usable_memory=lambda memory=memory: memory)
        monkeypatch.setitem(script["build"].__globals__, "machine", lambda here=here: here)
        built = script["build"]("_C_cuda", [], tmp_path / "build", tmp_path)
        assert jobs.pop() == expected
    assert built == {"size": 5, "sha256": hashlib.sha256(b"built").hexdigest(), "compiler": "GNU 12"}


@pytest.mark.slow
def test_an_error_in_our_code_fails_the_build(source: Path) -> None:
    with (source / "csrc" / "cpu" / "edge_start.cpp").open("a") as file:
        file.write("#error planted\n")
    done = setup_py(source, "build_ext", "--inplace", GCAHNG_CUDA="0")
    assert done.returncode != 0
    assert re.search(r"_C_cpu is not built: the build failed \(.*#error planted.*\); pip -v shows", done.stderr)


@pytest.mark.slow
def test_native_wheel_is_for_this_platform_and_every_python(source: Path, tmp_path: Path) -> None:
    done = setup_py(source, "bdist_wheel", GCAHNG_NATIVE="require", CMAKE_ARGS="-DGCAHNG_STRICT=ON")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    assert wheel.stat().st_size < 100 << 20
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = (
        "import torch, gcahng, gcahng.native\n"
        "gca = gcahng.GCAHNGLoss(5, 8, layers=1, heads=2, impl='cpp')\n"
        "gca(torch.randn(6, 8, requires_grad=True), torch.arange(3).repeat(2)).backward()\n"
        "print(gcahng.native.load('_C_cpu').path)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(installed / "gcahng" / "_C_cpu.so")
