"""Builds the native libraries where that is possible. For a library that is left out, one line says why.

CMakeLists.txt says how the libraries are built. This file decides whether they are built, and where they are put.
These environment variables change it:

    GCAHNG_NATIVE   unset: build what can be built
                    0: build nothing
                    require: fail if _C_cpu is left out, or if _C_cuda is although there is an nvcc
    GCAHNG_CUDA     unset: build _C_cuda if there is an nvcc
                    0: leave _C_cuda out
                    require: fail if _C_cuda is left out
    CMAKE_ARGS, CXX, CUDACXX, CUDA_HOME, MAX_JOBS   as usual
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
RECORD = "_native_build.json"  # gcahng/native.py reads it, since pip shows a build's output only with -v
TORCH_FLOOR = (2, 10)
LIBRARIES = ("_C_cpu", "_C_cuda")


class LeftOut(Exception):
    """A library is not built. The message says why, and what would help."""


def setting(name: str) -> str:
    """The value of GCAHNG_NATIVE or GCAHNG_CUDA."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "require"):
        raise OptionError(f"{name} is {value!r}; it must be unset, 0 or require")
    return value


def torch_dir() -> Path:
    """The folder of the installed torch.

    It is on this interpreter's path or, in pip's isolated build, in the target environment.

    Raises:
        LeftOut: there is no torch, or it is too old.
    """
    for path in (sys.path, [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]):
        spec = importlib.machinery.PathFinder.find_spec("torch", path)
        if spec and spec.origin:
            break
    else:
        raise LeftOut("no torch in this environment; install torch first, then gcahng")
    folder = Path(spec.origin).parent
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
    if version and tuple(map(int, version.groups())) < TORCH_FLOOR:
        raise LeftOut(f"torch {'.'.join(version.groups())} is installed, and torch >= 2.10 is needed")
    return folder


def program(variable: str, names: tuple[str, ...], folders: tuple[str, ...] = ()) -> str | None:
    """The path of a compiler.

    Args:
        variable: an environment variable that may name it.
        names: what is looked for otherwise, best first.
        folders: where it is looked for beside PATH.

    Returns:
        The path, or None if there is no such compiler.
    """
    wanted = os.environ.get(variable)
    if wanted:
        return shutil.which(shlex.split(wanted)[0])
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *folders))
    return next((place for name in names if (place := shutil.which(name, path=path))), None)


def configuration(library: str) -> list[str]:
    """The arguments of CMake for one library.

    Raises:
        LeftOut: something that the build needs is missing.
    """
    if sys.platform == "win32":
        raise LeftOut("there is no native code for Windows")
    if not shutil.which("cmake"):
        raise LeftOut("no cmake; install cmake >= 3.22")
    arguments = [f"-DTORCH_DIR={torch_dir()}"]
    if not program("CXX", ("c++", "g++", "clang++")):
        raise LeftOut("no C++ compiler; install g++ or clang++, or name one in CXX")
    if library == "_C_cpu":
        return [*arguments, "-DGCAHNG_CPU=ON", "-DGCAHNG_CUDA=OFF"]
    if sys.platform != "linux":
        raise LeftOut("CUDA code is built on Linux alone")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = program("CUDACXX", ("nvcc",), (f"{home}/bin",))
    if not nvcc:
        raise LeftOut("no nvcc; install a CUDA toolkit, or name its folder in CUDA_HOME")
    return [*arguments, "-DGCAHNG_CPU=OFF", "-DGCAHNG_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]


def run(step: str, command: list[str]) -> None:
    """Runs one step of a build. The whole output goes to stdout.

    Args:
        step: what the step is called in the error.
        command: what is run.

    Raises:
        LeftOut: the step failed; the message holds the first error of the output.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(done.stdout, flush=True)
    if done.returncode:
        errors = [line.strip() for line in done.stdout.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)]
        raise LeftOut(
            f"{step} failed ({errors[0] if errors else f'status {done.returncode}'}); pip -v shows the whole output"
        )


class NativeBuild(build_ext):
    """Builds each library by itself, so that one can fail without the other."""

    def run(self) -> None:
        """Builds the libraries, and records for each why it was left out."""
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "gcahng"
        package.mkdir(parents=True, exist_ok=True)
        for old in package.glob("_C_*.so"):
            old.unlink()  # a library of an earlier build must not stand in for one that is left out now
        native, cuda = setting("GCAHNG_NATIVE"), setting("GCAHNG_CUDA")
        record = {}
        for library in LIBRARIES:
            switch = (
                "GCAHNG_NATIVE" if native == "0" else "GCAHNG_CUDA" if library == "_C_cuda" and cuda == "0" else None
            )
            buildable = False
            try:
                if switch:
                    raise LeftOut(f"{switch}=0")
                arguments = configuration(library)
                buildable = True
                self.build_library(library, arguments, package.parent)
                record[library] = ""
            except LeftOut as why:
                record[library] = str(why)
                print(f"gcahng: {library} is left out: {why}", file=sys.stderr, flush=True)
                needed = library == "_C_cpu" or buildable
                if (native == "require" and needed and not switch) or (library == "_C_cuda" and cuda == "require"):
                    raise CompileError(
                        f"{library} is required (GCAHNG_NATIVE={native}, GCAHNG_CUDA={cuda}): {why}"
                    ) from None
        (package / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def build_library(self, library: str, arguments: list[str], prefix: Path) -> None:
        """Builds one library with CMake and installs it below `prefix`."""
        folder = Path(self.build_temp).resolve() / library
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "CMakeCache.txt").unlink(missing_ok=True)  # it may name tools of a build environment that is gone
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        run("cmake", ["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *arguments, *extra])
        run("the build", ["cmake", "--build", str(folder), "-j", jobs])
        run("cmake --install", ["cmake", "--install", str(folder), "--prefix", str(prefix)])

    def get_source_files(self) -> list[str]:
        """What a source distribution needs."""
        return []  # MANIFEST.in lists them

    def get_outputs(self) -> list[str]:
        """The files that the build has made."""
        return sorted(self.get_output_mapping()) if self.inplace else sorted(map(str, self.built(Path(self.build_lib))))

    def get_output_mapping(self) -> dict[str, str]:
        """The files that a strict editable install links to."""
        if not self.inplace:
            return {}
        return {str(Path(self.build_lib) / "gcahng" / path.name): str(path) for path in self.built(ROOT)}

    @staticmethod
    def built(prefix: Path) -> list[Path]:
        """The libraries below a folder, and the record of the build."""
        return [*(prefix / "gcahng").glob("_C_*.so"), prefix / "gcahng" / RECORD]


class Wheel(bdist_wheel):
    """A wheel for every Python 3, since the libraries hold no Python symbols; without libraries for every platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag."""
        platform = super().get_tag()[2]
        built = any((Path(self.bdist_dir) / "gcahng").glob("_C_*.so"))
        return "py3", "none", platform if built else "any"


setup(
    packages=sorted({*find_packages(include=["gcahng", "gcahng.*"]), "gcahng.kernels"}),
    package_dir={"gcahng.kernels": "kernels"},
    package_data={
        "gcahng": ["py.typed"],
        "gcahng.recipes": ["*.yaml"],
        "gcahng.report": ["page.css", "page.js"],
    },
    include_package_data=False,
    ext_modules=[Extension("gcahng._C", sources=[])],
    cmdclass={"build_ext": NativeBuild, "bdist_wheel": Wheel},
)
