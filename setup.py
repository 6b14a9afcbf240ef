"""Builds the native libraries. CMakeLists.txt says how; this file decides whether, and where they are put.

Where there is a C++ compiler, a build yields _C_cpu or fails. Pure Python comes only of GCAHNG_NATIVE=0, or where there
is no compiler. A last line says so, and the wheel has another name, since pip and uv show no other output:

    gcahng-0.1.0-py3-none-linux_x86_64.whl                        with _C_cpu
    gcahng-0.1.0-py3-none-any.whl                                 pure Python, as asked for
    gcahng-0.1.0-0_pure_python_no_compiler-py3-none-any.whl       pure Python, for want of a compiler

No torch is needed (see CMakeLists.txt). If the environment that is installed into has one without CUDA, _C_cuda could
never be loaded, and is left out. These environment variables change what is built:

    GCAHNG_NATIVE   unset: build what can be built
                    0: build nothing
                    require: fail without a compiler, too, and if _C_cuda does not build although there is an nvcc
    GCAHNG_CUDA     unset: build _C_cuda if there is an nvcc, and no torch without CUDA
                    0: leave _C_cuda out
                    require: fail if _C_cuda does not build
    CMAKE_ARGS, CXX, CUDACXX, CUDA_HOME, MAX_JOBS   as usual
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # it would fail at the license in pyproject.toml, in other words
    sys.exit(
        f"gcahng: error: setuptools is {setuptools.__version__}; it must be >= 77: run "
        "`pip install -U setuptools`, or install without --no-build-isolation"
    )

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
RECORD = "_native_build.json"  # gcahng/installed.py reads it
LIBRARIES = ("_C_cpu", "_C_cuda")
NO_COMPILER = "no C++ compiler; install g++ or clang++, or name one in CXX"
JOB_BYTES = {"_C_cpu": 400 << 20, "_C_cuda": 2 << 30}  # what compiling one file takes at most
ERROR = r"(?i)\berror\s*[:#]"  # of compilers and linkers, but not of files that are named so
KILLED = r"Killed signal|: Killed|died due to signal 9|signal 9\b|status 137"


LAST_WORDS: list[str] = []
atexit.register(lambda: [print(line, file=sys.stderr, flush=True) for line in LAST_WORDS])


class LeftOut(Exception):
    """A library is not built. The message says why, and what would help."""


def setting(name: str) -> str:
    """The value of GCAHNG_NATIVE or GCAHNG_CUDA."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "require"):
        raise OptionError(f"{name} is {value!r}; it must be unset, 0 or require")
    return value


def machine() -> ModuleType:
    """gcahng/machine.py, without gcahng."""
    spec = importlib.util.spec_from_file_location("machine", ROOT / "gcahng/machine.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(variable: str, names: tuple[str, ...], folders: tuple[str, ...] = ()) -> str | None:
    """The path of a compiler.

    Args:
        variable: an environment variable that may name it.
        names: what is looked for otherwise, best first.
        folders: where it is looked for beside PATH.

    Returns:
        The path, or None if there is no such compiler.

    Raises:
        OptionError: the variable names a program that is not there.
    """
    if wanted := os.environ.get(variable):
        if found := shutil.which(shlex.split(wanted)[0]):
            return found
        raise OptionError(f"{variable} is {wanted!r}; it must be a compiler on PATH, or the path of one")
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *folders))
    return next((place for name in names if (place := shutil.which(name, path=path))), None)


def pure() -> str | None:
    """Why nothing native is built, or None. No other reason leaves _C_cpu out: everything else is an error."""
    if setting("GCAHNG_NATIVE") == "0":
        return "GCAHNG_NATIVE=0"
    if sys.platform == "win32":
        return "there is no native code for Windows"
    return None if program("CXX", ("c++", "g++", "clang++")) else NO_COMPILER


def site_folders() -> list[str]:
    """Where the environment that is installed into may have torch, best first.

    That is this interpreter's path, or for pip's isolated build this interpreter's environment. The build of uv runs in
    an environment elsewhere, and only VIRTUAL_ENV or .venv says which one is meant.
    """

    def folders(base: str) -> list[str]:
        schemes = [s for s in ("posix_prefix", "posix_local", "deb_system") if s in sysconfig.get_scheme_names()]
        values = {"base": base, "platbase": base, "installed_base": base, "installed_platbase": base}
        return [sysconfig.get_path(kind, scheme, values) for scheme in schemes for kind in ("purelib", "platlib")]

    found = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    environments = [os.environ.get("VIRTUAL_ENV", ""), str(Path.cwd() / ".venv")]
    found += [folder for base in environments if base and Path(base).is_dir() for folder in folders(base)]
    settings = Path(sys.prefix, "pyvenv.cfg")
    if not settings.exists() or re.search(r"include-system-site-packages\s*=\s*true", settings.read_text()):
        found += [site.getusersitepackages(), *folders(sys.base_prefix)]
    return found


def torch_without_cuda() -> str | None:
    """The version of the torch that gcahng is built for if that has no CUDA. Its version file says so, unimported."""
    versions = (Path(folder or ".", "torch", "version.py") for folder in site_folders())
    if (found := next((path for path in versions if path.is_file()), None)) is None:
        return None
    text = found.read_text()
    version = re.search(r"__version__ = '([^']+)", text)
    return version[1] if version and re.search(r"^cuda(: [^=]+)? = None", text, re.MULTILINE) else None


def configuration(library: str) -> list[str]:
    """The arguments of CMake for one library.

    Raises:
        LeftOut: something that the build needs is missing.
    """
    if not shutil.which("cmake"):
        raise LeftOut("no cmake; run `pip install cmake ninja`, or install without --no-build-isolation")
    if library == "_C_cpu":
        return ["-DGCAHNG_CPU=ON", "-DGCAHNG_CUDA=OFF"]
    if sys.platform != "linux":
        raise LeftOut("CUDA code is built on Linux alone")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = program("CUDACXX", ("nvcc",), (f"{home}/bin",))
    if not nvcc:
        raise LeftOut("no nvcc; install a CUDA toolkit, or name its folder in CUDA_HOME")
    if setting("GCAHNG_CUDA") != "require" and (version := torch_without_cuda()):
        raise LeftOut(
            f"torch {version} is built without CUDA, so that it could not be loaded; install a CUDA build of torch "
            "first, or set GCAHNG_CUDA=require"
        )
    return ["-DGCAHNG_CPU=OFF", "-DGCAHNG_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]


def reason_of(step: str, output: str) -> str | None:
    """The line of a failed step's output that says what went wrong.

    A compiler's first error causes the others. CMake ends with the error that stopped it, which may quote a compiler.
    """
    if step != "cmake":
        lines = [line.strip() for line in output.splitlines() if re.search(ERROR, line)]
        return lines[0] if lines else None
    _, found, last = output.rpartition("CMake Error")
    if not found:
        return None
    last = re.split(r"^-- |^CMake Warning|^See also", last, flags=re.MULTILINE)[0]
    head, _, body = last.partition("\n")
    message = " ".join(body.split("It fails with the following output")[0].split())
    quoted = [line.strip() for line in body.splitlines() if re.search(ERROR, line)]
    if quoted and quoted[-1] not in message:
        message = f"{message} {quoted[-1]}"
    return message or head.strip(" :")


def run(step: str, command: list[str]) -> None:
    """Runs one step of a build. The whole output goes to stdout.

    Args:
        step: what the step is called in the error.
        command: what is run.

    Raises:
        MemoryError: a compiler was killed.
        LeftOut: the step failed otherwise; the message says why.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(done.stdout, flush=True)
    if done.returncode:
        if re.search(KILLED, done.stdout):
            raise MemoryError
        why = reason_of(step, done.stdout) or f"status {done.returncode}"
        raise LeftOut(f"{step} failed ({why}); pip -v shows the whole output")


def build(library: str, arguments: list[str], folder: Path, prefix: Path) -> dict[str, object]:
    """Builds one library with CMake and installs it.

    Args:
        library: _C_cpu or _C_cuda.
        arguments: of CMake.
        folder: where it is built.
        prefix: the folder above the package that it is put into.

    Returns:
        What the record says about the library: its size and hash, the compiler and its flags.

    Raises:
        LeftOut: a step failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "CMakeCache.txt").unlink(missing_ok=True)  # it may name tools of a build environment that is gone
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    run("cmake", ["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *arguments, *extra])
    here = machine()
    fit = max(1, (here.usable_memory() or sys.maxsize) // JOB_BYTES[library])
    jobs = os.environ.get("MAX_JOBS") or str(min(here.usable_cpus(), fit))
    command = ["cmake", "--build", str(folder), "-j"]
    try:
        try:
            run("the build", [*command, jobs])
        except MemoryError:
            if jobs == "1":
                raise
            run("the build", [*command, "1"])  # continues with what is not compiled yet
    except MemoryError:
        raise LeftOut(
            "the compiler was killed, even as the only one at a time: that is what the system does when memory runs "
            "out; give the build more memory"
        ) from None
    run("cmake --install", ["cmake", "--install", str(folder), "--prefix", str(prefix)])
    content = (prefix / "gcahng" / f"{library}.so").read_bytes()
    facts = json.loads((folder / "build.json").read_text())
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), **facts}


def leave_out(library: str, why: str) -> dict[str, object]:
    """Says at the very end of the build that a library is left out, and returns what the record says about it."""
    LAST_WORDS.append(f"gcahng: {library} is left out: {why}")
    return {"reason": why}


def fail(library: str, why: str) -> CompileError:
    """The error of a library that has to be built."""
    cure = (
        "GCAHNG_NATIVE=0 installs gcahng without native libraries, which is slower"
        if library == "_C_cpu"
        else "GCAHNG_CUDA=0 leaves it out"
    )
    return CompileError(f"{library} is not built: {why}. {cure}.")


def build_all(package: Path, temporary: Path) -> None:
    """Builds the libraries into a package, and records how, or why one was left out.

    Args:
        package: the folder `gcahng` that they are put into.
        temporary: where they are built.

    Raises:
        CompileError: a library fails to build that must not be left out.
    """
    package.mkdir(parents=True, exist_ok=True)
    for old in (*package.glob("_C_*.so"), package / RECORD):
        old.unlink(missing_ok=True)  # one of an earlier build must not stand in for one that is left out now
    native, cuda = setting("GCAHNG_NATIVE"), setting("GCAHNG_CUDA")
    record = {}
    for library in LIBRARIES:
        arguments: list[str] = []
        try:
            if why := pure():
                raise LeftOut(why)
            if library == "_C_cuda" and cuda == "0":
                raise LeftOut("GCAHNG_CUDA=0")
            arguments = configuration(library)
            record[library] = build(library, arguments, temporary / library, package.parent)
        except LeftOut as why:
            if library == "_C_cpu":
                needed = not pure() or (native == "require" and pure() == NO_COMPILER)
            else:
                needed = cuda == "require" or (native == "require" and bool(arguments))
            if needed:
                raise fail(library, str(why)) from None
            record[library] = leave_out(library, str(why))
    (package / RECORD).write_text(json.dumps(record, indent=1) + "\n")


class Python(build_py):
    """Copies the modules. What an earlier build has copied goes first: a module that was deleted must not survive."""

    def run(self) -> None:
        """Copies them."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "gcahng", ignore_errors=True)
        super().run()


class Native(build_ext):
    """Builds each library by itself, so that _C_cuda can be left out."""

    def run(self) -> None:
        """Builds them."""
        build_all(
            (ROOT if self.inplace else Path(self.build_lib).resolve()) / "gcahng", Path(self.build_temp).resolve()
        )

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

    def finalize_options(self) -> None:
        """Marks a wheel that lacks a compiler's work: its name is all that pip shows of a build."""
        if pure() == NO_COMPILER and self.build_number is None:
            self.build_number = "0_pure_python_no_compiler"
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag."""
        return "py3", "none", "any" if pure() else super().get_tag()[2]

    def write_wheelfile(self, *arguments: object, **options: object) -> None:
        """Writes WHEEL, with Root-Is-Purelib according to what was built."""
        self.root_is_pure = bool(pure())
        super().write_wheelfile(*arguments, **options)  # type: ignore[arg-type]


def long_description() -> str:
    """README.md with absolute links, since an index shows it alone. They lead to the files of this version."""
    readme, project, package = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "pyproject.toml", "gcahng/__init__.py")
    )
    repository = re.search(r'^Repository = "(.+?)"', project, re.MULTILINE)
    version = re.search(r'^__version__ = "(.+?)"', package, re.MULTILINE)
    assert repository and version

    def absolute(link: re.Match[str]) -> str:
        return f"{link[0]}{repository[1]}/{'raw' if link[1] else 'blob'}/v{version[1]}/"

    return re.sub(r"(!?)\[[^\]]*\]\((?![a-z]+:|#)", absolute, readme)


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=sorted({*find_packages(include=["gcahng", "gcahng.*"]), "gcahng.kernels"}),
    package_dir={"gcahng.kernels": "kernels"},
    package_data={
        "gcahng": ["py.typed"],
        "gcahng.recipes": ["*.yaml"],
        "gcahng.report": ["page.css", "page.js"],
    },
    include_package_data=False,
    ext_modules=[Extension("gcahng._C", sources=[])],
    cmdclass={"build_py": Python, "build_ext": Native, "bdist_wheel": Wheel},
)
