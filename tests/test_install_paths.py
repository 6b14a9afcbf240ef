"""Every usual way to install gcahng ends with a C++ library that runs, whether torch is there before, beside or after.

The environments get no torch of their own: a .pth file shows them that of this interpreter, where the case wants it
before the installation, and else after it. pip takes the tools of a build from its index.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from installs import SETTINGS

pytestmark = pytest.mark.slow

STEP = """
import torch, gcahng
from gcahng import native
gca = gcahng.GCAHNGLoss(5, 8, layers=1, heads=2, impl="cpp")
gca(torch.randn(6, 8, requires_grad=True), torch.arange(3).repeat(2)).backward()
print(native.load("_C_cpu").path)
"""


class Environment:
    """A virtual environment, and commands that run in it."""

    def __init__(self, folder: Path, *options: str) -> None:
        subprocess.run([sys.executable, "-m", "venv", *options, str(folder)], check=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.site = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        inherited = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "PYTHONPATH")}
        self.variables = inherited | {
            "GCAHNG_CUDA": "0",
            "PIP_CACHE_DIR": str(folder.parent / "pip-cache"),
            "PIP_NO_DEPS": "1",
            "UV_CACHE_DIR": str(folder.parent / "uv-cache"),
        }

    def show_torch(self) -> None:
        """Makes the torch of this interpreter importable, last on the path."""
        (self.site / "torch_of_the_tests.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def run(self, *command: object, fails: bool = False, cwd: Path | None = None, **variables: str) -> str:
        """Runs a command and returns all that it prints."""
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd or self.folder,
            env=self.variables | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    def pip(self, *arguments: object, fails: bool = False, **variables: str) -> str:
        """Runs pip, and returns what it prints."""
        return self.run(self.python, "-m", "pip", *arguments, fails=fails, **variables)

    def works(self, **variables: str) -> Path:
        """Runs a step in C++, and returns where the library is."""
        self.show_torch()
        return Path(self.run(self.python, "-c", STEP, **variables).splitlines()[-1])


def uv() -> str:
    """The path of uv, which [test] installs."""
    found = shutil.which("uv")
    assert found, "uv is not installed"
    return found


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """An environment with pip and nothing else."""
    return Environment(tmp_path / "env")


def test_pip_install_without_torch(source: Path, environment: Environment) -> None:
    said = environment.pip("install", source)
    assert "pure_python" not in said
    assert environment.works().is_relative_to(environment.site)


def test_pip_install_together_with_torch(source: Path, environment: Environment, tmp_path: Path) -> None:
    """`pip install torch .` builds gcahng before it installs torch, which is a stand-in here."""
    version = metadata.version("torch").partition("+")[0]
    wheel = tmp_path / f"torch-{version}-py3-none-any.whl"
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("torch_of_the_tests.pth", f"{sysconfig.get_path('purelib')}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    environment.pip("install", wheel, source)
    assert environment.works().is_relative_to(environment.site)


def test_python_m_build(source: Path, environment: Environment) -> None:
    """It makes the source distribution, and the wheel from that, in an environment without torch."""
    environment.run(sys.executable, "-m", "build", ".", cwd=source, **_searched())
    (wheel,) = (source / "dist").glob("*.whl")
    assert "-py3-none-linux_" in wheel.name or "-py3-none-macosx_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        (tags,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in tags
    environment.pip("install", wheel)
    assert environment.works().is_relative_to(environment.site)


def test_uv_pip_install(source: Path, environment: Environment) -> None:
    """And uv builds again when a setting or a source changes, instead of taking a wheel from its cache."""
    command = (uv(), "pip", "install", "--no-deps", "--python", environment.python, source)
    environment.run(*command, GCAHNG_NATIVE="0")
    assert not list(environment.site.glob("gcahng/*.so"))
    environment.run(*command)
    assert environment.works().is_relative_to(environment.site)


def test_pip_install_user_in_an_environment_that_sees_the_system(source: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "env", "--system-site-packages")
    user = {"PYTHONUSERBASE": str(tmp_path / "user")}
    environment.pip("install", "--user", "--ignore-installed", source, **user)
    assert environment.works(**user).is_relative_to(tmp_path / "user")


def test_pip_install_in_an_environment_that_sees_the_system(source: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "env", "--system-site-packages")
    environment.pip("install", source)
    assert environment.works().is_relative_to(environment.site)


def test_pip_install_without_build_isolation(source: Path, environment: Environment) -> None:
    environment.pip("install", "setuptools>=77", "cmake>=3.26", "ninja")
    environment.show_torch()
    environment.pip("install", "--no-build-isolation", source, PATH=f"{environment.folder}/bin:{os.environ['PATH']}")
    assert environment.works().is_relative_to(environment.site)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable(source: Path, environment: Environment, mode: str) -> None:
    options = ["--config-settings", "editable_mode=strict"] if mode == "strict" else []
    environment.pip("install", *options, "-e", source)
    library = environment.works()
    assert library.resolve() == source / "gcahng" / "_C_cpu.so" or mode == "strict"
    said = environment.run(environment.python, "-m", "gcahng", "env")
    assert "editable" in said and "as built" in said and "not as built" not in said


def test_a_cached_pure_wheel_is_told_and_replaced_by_the_command_that_is_told(
    source: Path, environment: Environment, tmp_path: Path
) -> None:
    """pip looks up wheels that it has built by name and tags alone, and takes a pure one for any later request."""
    environment.run(sys.executable, "setup.py", "-q", "sdist", cwd=source)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    wanted = f"gcahng @ {sdist.as_uri()}"  # a file without a name is not looked up
    environment.pip("install", wanted, GCAHNG_NATIVE="0")
    environment.pip("install", "--force-reinstall", wanted, GCAHNG_NATIVE="require")
    environment.show_torch()
    said = environment.run(environment.python, "-c", "import gcahng, gcahng.ops, gcahng.dispatch")
    (line,) = said.splitlines()
    assert line.startswith("gcahng runs without its C++ library") and "--no-cache-dir" in line
    environment.run("bash", "-c", line.partition("run: ")[2])
    assert environment.works().is_relative_to(environment.site)
    record = json.loads((environment.site / "gcahng" / "_native_build.json").read_text())
    assert record["_C_cpu"]["size"] == (environment.site / "gcahng" / "_C_cpu.so").stat().st_size


def test_no_cuda_library_beside_a_torch_without_cuda(source: Path, environment: Environment) -> None:
    (environment.site / "torch").mkdir()
    (environment.site / "torch" / "version.py").write_text("__version__ = '2.14.1+cpu'\ncuda: Optional[str] = None\n")
    said = environment.pip("install", "-v", source, GCAHNG_CUDA="", CUDACXX=sys.executable)  # would build with that
    assert "gcahng: _C_cuda is left out: torch 2.14.1+cpu is built without CUDA" in said
    shutil.rmtree(environment.site / "torch")
    assert environment.works().is_relative_to(environment.site)


def test_a_source_folder_that_hides_the_installed_library_is_told(source: Path, environment: Environment) -> None:
    environment.pip("install", source)
    environment.show_torch()
    shutil.rmtree(source / "build", ignore_errors=True)
    said = environment.run(environment.python, "-m", "gcahng", "env", cwd=source)
    assert f"is a source folder that hides the gcahng installed in {environment.site / 'gcahng'}" in said
    assert "use the command gcahng, not python -m gcahng" in said
    assert "hides" not in environment.run(environment.folder / "bin" / "gcahng", "env", cwd=source)


def _searched() -> dict[str, str]:
    """PYTHONPATH as this process has it, for a tool that may have been found there."""
    return {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
