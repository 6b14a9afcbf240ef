"""What gets installed: pure Python, what is said about libraries that are left out, and what is in wheel and sdist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("csrc", "gcahng", "kernels", "setup.py", "CMakeLists.txt", "MANIFEST.in", "pyproject.toml")
NAMED_IN_PYPROJECT = ("README.md", "LICENSE", "THIRD_PARTY_NOTICES.md")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, so that the build writes nothing into the source folder."""
    folder = tmp_path / "source"
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_native_build.json")
    for name in (*NEEDED, *NAMED_IN_PYPROJECT):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(path, folder / name)
    return folder


def setup_py(
    folder: Path, *arguments: str, python: Path | str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs setup.py; GCAHNG_* and compilers come from the arguments alone."""
    cleared = ("GCAHNG_NATIVE", "GCAHNG_CUDA", "CXX", "CUDACXX", "CMAKE_ARGS")
    inherited = {name: value for name, value in os.environ.items() if name not in cleared}
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
    assert record == {"_C_cpu": "GCAHNG_NATIVE=0", "_C_cuda": "GCAHNG_NATIVE=0"}
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
    assert "_C_cpu was not built (at build time: GCAHNG_NATIVE=0)" in done.stdout


@pytest.mark.processes
def test_sdist_holds_all_sources(source: Path) -> None:
    done = setup_py(source, "sdist", GCAHNG_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (sdist,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "kernels"):
        expected = {str(path.relative_to(source)) for path in (source / folder).rglob("*") if path.is_file()}
        assert expected <= names, expected - names
    assert {"CMakeLists.txt", "setup.py", "gcahng/py.typed", "gcahng/engine/stages/gate.py"} <= names
    assert "gcahng/recipes/resnet50_cub200.yaml" in names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_native_build.json"))]


@pytest.mark.processes
def test_no_compiler_says_so_in_one_line_a_library(source: Path, tmp_path: Path) -> None:
    path = only(tmp_path / "bin", "cmake")
    done = setup_py(source, "build_ext", "--inplace", PATH=path)
    assert done.returncode == 0, done.stderr
    reason = "no C++ compiler; install g++ or clang++, or name one in CXX"
    assert said(done) == [f"gcahng: {name} is left out: {reason}" for name in ("_C_cpu", "_C_cuda")]
    assert json.loads((source / "gcahng/_native_build.json").read_text()) == dict.fromkeys(
        ("_C_cpu", "_C_cuda"), reason
    )
    required = setup_py(source, "build_ext", "--inplace", PATH=path, GCAHNG_NATIVE="require")
    assert required.returncode != 0 and f"_C_cpu is required (GCAHNG_NATIVE=require, GCAHNG_CUDA=): {reason}" in (
        required.stderr
    )


@pytest.mark.processes
def test_no_cmake_says_so(source: Path, tmp_path: Path) -> None:
    done = setup_py(source, "build_ext", "--inplace", PATH=only(tmp_path / "bin", "c++"))
    assert done.returncode == 0, done.stderr
    assert said(done)[0] == "gcahng: _C_cpu is left out: no cmake; install cmake >= 3.22"


@pytest.mark.processes
def test_no_torch_says_so(source: Path, tmp_path: Path) -> None:
    """As in an environment where gcahng is installed first."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    site = tmp_path / "site"
    site.mkdir()
    import setuptools

    for name in ("setuptools", "_distutils_hack"):
        (site / name).symlink_to(Path(setuptools.__file__).parents[1] / name)
    python = tmp_path / "bare" / "bin" / "python"
    done = setup_py(source, "build_ext", "--inplace", python=python, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert said(done)[0] == (
        "gcahng: _C_cpu is left out: no torch in this environment; install torch first, then gcahng"
    )


@pytest.mark.processes
def test_no_nvcc_says_so_and_may_be_an_error(source: Path, tmp_path: Path) -> None:
    path = only(tmp_path / "bin", "cmake", "c++")
    (source / "csrc" / "bindings_cpu.cpp").write_text("#error planted\n")  # nothing to compile: this is about CUDA
    done = setup_py(source, "build_ext", "--inplace", PATH=path, CUDA_HOME=str(tmp_path), GCAHNG_CUDA="require")
    assert done.returncode != 0
    assert "_C_cuda is left out: no nvcc; install a CUDA toolkit, or name its folder in CUDA_HOME" in said(done)[1]


def test_settings_are_checked(source: Path) -> None:
    done = setup_py(source, "build_ext", GCAHNG_NATIVE="yes")
    assert done.returncode != 0
    assert "GCAHNG_NATIVE is 'yes'; it must be unset, 0 or require" in done.stderr


@pytest.mark.processes
def test_an_error_in_our_code_leaves_the_library_out_unless_required(source: Path) -> None:
    """An old library must not stay in its place either."""
    (source / "gcahng" / "_C_cpu.so").write_bytes(b"of an earlier build")
    with (source / "csrc" / "cpu" / "edge_start.cpp").open("a") as file:
        file.write("#error planted\n")
    done = setup_py(source, "build_ext", "--inplace", GCAHNG_CUDA="0")
    assert done.returncode == 0, done.stderr
    cpu, cuda = said(done)
    assert re.fullmatch(
        r"gcahng: _C_cpu is left out: the build failed \(.*#error planted.*\); pip -v shows the whole output", cpu
    )
    assert cuda == "gcahng: _C_cuda is left out: GCAHNG_CUDA=0"
    assert not (source / "gcahng" / "_C_cpu.so").exists()
    required = setup_py(source, "build_ext", "--inplace", GCAHNG_CUDA="0", GCAHNG_NATIVE="require")
    assert required.returncode != 0 and "#error planted" in required.stderr


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
