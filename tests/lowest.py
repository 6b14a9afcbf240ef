"""Runs tests with the oldest versions that pyproject.toml allows of what gcahng and some of its extras depend on.

    python tests/lowest.py [--keep FOLDER] [pytest's arguments]

uv resolves and installs them into a new environment. torch, torchvision, torchmetrics and pytest are borrowed from the
Python that runs this, so that nothing large is installed. Nothing else is there: tests find what is not declared.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = ("torch", "torchvision")
BORROWED = (*LEFT_OUT, "pytest", "pytest-xdist", "pytest-benchmark", "torchmetrics")
EXTRAS = ("train", "faiss-cpu")
# Each of them uses some of the packages; together they use all.
TESTS = (
    "tests/data",
    "tests/report",
    "tests/retrieval/test_metrics.py",
    "tests/runs",
    "tests/models/test_backbones.py",
    "tests/train/test_commands.py",
    "tests/train/test_config.py",
    "tests/train/test_fit.py",
    "tests/test_help.py",
    "tests/train/test_optim.py",
    "tests/losses/test_gca_hng.py",
    "tests/test_yaml_files.py",
)
VERSIONS = """
import importlib.metadata, sys
for line in sys.stdin:
    name, version = line.strip().split("==")
    found = importlib.metadata.version(name)
    assert found == version, f"{name} is {found}, and not {version}"
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", metavar="FOLDER", help="make the environment there and leave it; it must be new")
    options, arguments = parser.parse_known_args()
    if shutil.which("uv") is None:
        parser.error('uv is not installed; pip install uv, or pip install ".[dev]"')
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary) / "environment"
        lowest = resolved(Path(temporary))
        print(" ".join(lowest), flush=True)
        python = environment(folder, lowest)
        direct = [pin for pin in lowest if pin.partition("==")[0] in declared()]
        subprocess.run([python, "-c", VERSIONS], input="\n".join(direct), text=True, check=True)
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(python), "-m", "pytest", "-q", *(arguments or TESTS)]
        return subprocess.run(command, cwd=ROOT, env=clean | {"PYTHONPATH": str(ROOT)}).returncode


def resolved(folder: Path) -> list[str]:
    """NAME==VERSION of everything but torch: of direct dependencies the oldest version, of others the newest."""
    left_out = folder / "left_out.txt"
    left_out.write_text("\n".join(LEFT_OUT))
    command = ["uv", "pip", "compile", "--quiet", "--resolution", "lowest-direct"]
    command += [part for extra in EXTRAS for part in ("--extra", extra)]
    command += ["--excludes", str(left_out), "--no-annotate", "--no-header", "--python", sys.executable]
    done = subprocess.run([*command, str(ROOT / "pyproject.toml")], check=True, capture_output=True, text=True)
    return [line.partition(" ")[0] for line in done.stdout.splitlines() if "==" in line]


def environment(folder: Path, pins: list[str]) -> Path:
    """A new environment with these packages, and with links to those of this one that are borrowed; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run(["uv", "pip", "install", "--quiet", "--no-deps", "--python", str(python), *pins], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    for name in BORROWED:
        borrow(name, site, set())
    return python


def borrow(name: str, site: Path, seen: set[str]) -> None:
    """Link an installed package, and what it needs, into a folder that has no other version of it."""
    try:
        found = distribution(name)
    except PackageNotFoundError:  # of another system, or an extra
        return
    if name in seen or any(True for _ in distributions(name=name, path=[str(site)])):
        return
    seen.add(name)
    for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
        if not (site / top).exists():
            (site / top).symlink_to(found.locate_file(top))
    for requirement in found.requires or ():
        if "extra ==" not in requirement:
            borrow(re.match(r"[\w.-]+", requirement)[0], site, seen)  # type: ignore[index]


def declared() -> set[str]:
    """The names of gcahng's dependencies and of those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    direct = [*project["dependencies"], *(requirement for extra in EXTRAS for requirement in extras[extra])]
    return {re.match(r"[\w-]+", requirement)[0] for requirement in direct} - set(LEFT_OUT)  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
