"""Builds a release, checks its files, and tries the wheel in fresh environments.

    python -m pip install -r release/requirements.txt
    python release/check.py                                  all of it
    python release/check.py --torch 2.10 --python 3.11       one environment
    python release/check.py --wheel dist/gcahng-….whl        a wheel that is there already

An environment gets one torch by pip, with the index and the cache that pip is set up for; it is deleted before the next
one. In each, three things must hold: `gcahng env` exits with 0 and _C_cpu is loaded; README's Python blocks run; the
golden tests pass. numpy 1.26 is tried in the same environment, after the newest, where it has wheels. The table at the
end is what docs/support.md has to agree with. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from distributions import PLATFORM, ROOT, build, faults_of_sdist, faults_of_wheel

TORCHES = ("2.10", "2.11", "2.12", "2.13", "newest")
NUMPYS = ("newest", "1.26")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
WITHOUT_OLD_NUMPY = ("3.13", "3.14")  # numpy 1.26 has no wheels for them
TESTS = ("pytest>=8", "pytest-xdist", "safetensors")  # what the golden tests and tests/conftest.py need
FACTS = """
import platform, numpy, torch
from gcahng import native
cuda = native.load("_C_cuda")
print(torch.__version__, numpy.__version__, platform.python_version(), sep="|", end="|")
print(native.load("_C_cpu").reason or "loaded", cuda.reason or "loaded", sep="|")
"""


@dataclass
class Row:
    """What was seen in one environment with one numpy."""

    torch: str
    python: str
    numpy: str
    cpu: str = ""
    cuda: str = ""
    readme: str = ""
    golden: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.cpu == "loaded" and self.readme == "runs" and bool(re.fullmatch(r"\d+ passed", self.golden))

    def cells(self) -> tuple[str, ...]:
        return (
            self.torch,
            self.python,
            self.numpy,
            self.cpu,
            self.cuda,
            self.readme,
            self.golden,
            f"{self.seconds:.0f}",
        )


def interpreters(wanted: list[str]) -> dict[str, str]:
    """Those of the wanted Pythons that are on this machine: PATH, pyenv's, and those of GitHub's runners."""
    homes = [Path.home() / ".pyenv" / "versions", Path("/opt/hostedtoolcache/Python")]
    found = {}
    for version in wanted:
        kept = [path for home in homes for path in sorted(home.glob(f"{version}.*/**/bin/python{version}"))]
        for path in (shutil.which(f"python{version}"), *map(str, kept)):
            works = path and subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
            if works:
                found[version] = path
                break
    return found


def plan(torches: list[str], pythons: list[str]) -> list[tuple[str, str]]:
    """Which torch is tried with which Python: each of both at least once, since all pairs would take hours."""
    pairs = [(torch, pythons[k % len(pythons)]) for k, torch in enumerate(torches)]
    pairs += [(torches[-1], python) for python in pythons if python not in {used for _, used in pairs}]
    return pairs


def run(command: list[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command away from the source tree, with no other gcahng in sight."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=folder, env=inherited | environment, capture_output=True, text=True)
    if done.returncode:
        print(f"$ {' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}", flush=True)
    return done


def readme_code() -> str:
    """README's Python blocks, which belong together."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.M)
    if not blocks:
        raise ValueError("README.md has no Python block; it must show how the loss is used")
    return "\n".join(blocks)


def look(python: Path, folder: Path, row: Row) -> None:
    """Fills in what is seen in an environment."""
    facts = run([python, "-c", FACTS], folder)
    if facts.returncode or run([python.with_name("gcahng"), "env"], folder).returncode:
        row.cpu = "fails"
        return
    row.torch, row.numpy, row.python, row.cpu, row.cuda = facts.stdout.strip().split("|")
    row.cuda = {"loaded": "loaded"}.get(row.cuda, "not built" if "not built" in row.cuda else "not loaded")
    row.readme = "fails" if run([python, "-c", readme_code()], folder).returncode else "runs"
    tests = [folder / "tests" / "golden", "-k", "not triton"]  # Triton's kernels need Triton, and no wheel of ours
    golden = run([python.with_name("pytest"), "-q", "-p", "no:cacheprovider", *tests], folder)
    last = golden.stdout.rstrip().rpartition("\n")[2]
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)\b", last)
    row.golden = ", ".join(counts) or "fails"


def environment(wheel: Path, torch: str, python: str, numpys: list[str], folder: Path) -> list[Row]:
    """Makes an environment, looks into it with each numpy, and deletes it.

    Args:
        wheel: what is tried.
        torch: such as "2.10", or "newest".
        python: the interpreter.
        numpys: "newest", or such as "1.26".
        folder: a temporary folder, which has a copy of the tests.
    """
    home = folder / "environment"
    inside = home / "bin" / "python"
    version = Path(python).name.removeprefix("python")
    rows = []
    try:
        run([python, "-m", "venv", home], folder)
        for k, numpy in enumerate(numpys):
            if numpy != "newest" and version in WITHOUT_OLD_NUMPY:
                continue
            row = Row(torch, version, numpy)
            rows.append(row)
            start = time.monotonic()
            what = ["numpy" if numpy == "newest" else f"numpy=={numpy}.*"]
            if k == 0:
                what += ["torch" if torch == "newest" else f"torch=={torch}.*", str(wheel), *TESTS]
            if run([inside, "-m", "pip", "install", "--quiet", *what], folder).returncode:
                row.cpu = "not installed"
                break
            look(inside, folder, row)
            row.seconds = time.monotonic() - start
            print("| " + " | ".join(row.cells()) + " |", flush=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    heading = ("torch", "Python", "numpy", "_C_cpu", "_C_cuda", "README", "golden tests", "seconds")
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heading, ("---",) * 8, *(r.cells() for r in rows)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=list(TORCHES), help="such as 2.10, or newest")
    parser.add_argument("--python", nargs="+", default=list(PYTHONS), help="those of them that are here")
    parser.add_argument("--numpy", nargs="+", default=list(NUMPYS), help="such as 1.26, or newest")
    parser.add_argument("--wheel", type=Path, help="check this repaired wheel and build nothing")
    parser.add_argument("--platform", default=PLATFORM, help="what the wheel has to be for (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="where files are built (default: dist)")
    parser.add_argument("--no-environments", action="store_true", help="check the files alone")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    if options.wheel and not options.wheel.is_file():
        print(f"--wheel is {options.wheel}; it must be a wheel's file", file=sys.stderr)
        return 2
    if not options.wheel and options.output.exists() and any(options.output.iterdir()):
        print(f"--output is {options.output}, which is not empty; delete it, or name another", file=sys.stderr)
        return 2
    pythons = interpreters(options.python)
    if not pythons:
        print(f"--python is {' '.join(options.python)}; one of them must be on this machine", file=sys.stderr)
        return 2
    start = time.monotonic()
    if options.wheel:
        wheel, faults = options.wheel.resolve(), []
    else:
        sdist, wheel = build(options.output.resolve(), options.platform)
        faults = faults_of_sdist(sdist)
    faults += faults_of_wheel(wheel, options.platform)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for torch, python in [] if options.no_environments else plan(options.torch, list(pythons)):
            rows += environment(wheel, torch, pythons[python], options.numpy, folder)
    print(f"\n{wheel.name}\n\n{table(rows)}\n")
    for version in options.python:
        if version not in pythons:
            print(f"not tried: Python {version}, which is not on this machine")
    for fault in faults:
        print(f"fault: {fault}")
    bad = len(faults) + sum(not row.passed for row in rows)
    print(f"{len(rows)} environments, {bad} failures, {(time.monotonic() - start) / 60:.0f} minutes")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
