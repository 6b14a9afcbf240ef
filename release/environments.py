"""Fresh environments in which a wheel is tried, and what is seen in them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_OLD_NUMPY = ("3.13", "3.14")  # numpy 1.26 has no wheels for them
TESTS = ("pytest>=8", "pytest-xdist", "safetensors")  # what the golden tests and tests/conftest.py need
HEADING = ("torch", "its CUDA", "Python", "numpy", "_C_cpu", "_C_cuda", "README", "golden tests", "seconds")
UV = (sys.executable, "-m", "uv")


@dataclass
class Row:
    """What was seen in one environment with one numpy; its fields are the columns of the table."""

    torch: str
    torch_cuda: str
    python: str
    numpy: str
    cpu: str = ""
    cuda: str = ""
    readme: str = ""
    golden: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether everything holds. A wheel without _C_cuda is as good as one with it."""
        beside = "refused" if self.torch_cuda == "none" else "loaded"
        return (
            self.cpu == "loaded"
            and self.cuda in ("not built", beside)
            and self.readme == "runs"
            and bool(re.fullmatch(r"\d+ passed", self.golden))
        )

    def cells(self) -> tuple[str, ...]:
        """The row as texts."""
        return (*(str(getattr(self, field.name)) for field in fields(self)[:-1]), f"{self.seconds:.0f}")


class Environment:
    """A virtual environment with one torch and a wheel.

    Args:
        folder: where it is made.
        python: the interpreter.
        torch: such as 2.10, 2.13.0+cpu or newest.
        wheel: the wheel that is tried.
        cache: uv's, where UV_CACHE_DIR names none. Files are linked from it, so it should be on the same disk.
    """

    def __init__(self, folder: Path, python: str, torch: str, wheel: Path, cache: Path) -> None:
        self.folder, self._interpreter, self._wheel = folder, python, wheel
        self.torch, self.version = torch, Path(python).name.removeprefix("python")
        self.python = folder / "bin" / "python"
        self._cache = os.environ.get("UV_CACHE_DIR", str(cache))

    def make(self) -> bool:
        """Makes it, with the newest numpy; False: that failed, and the reason is printed."""
        torch = {"newest": "torch"}.get(self.torch, f"torch=={self.torch}")
        if re.fullmatch(r"\d+\.\d+", self.torch):
            torch += ".*"
        made = self._uv("venv", "--python", self._interpreter, self.folder)
        return made and self.install(torch, "numpy", str(self._wheel), *TESTS)

    def install(self, *what: str) -> bool:
        """Installs packages; False: that failed, and the reason is printed."""
        return self._uv("pip", "install", "--python", self.python, *what)

    def _uv(self, *arguments: str | Path) -> bool:
        command = [*UV, arguments[0], "--quiet", *arguments[1:]]
        return run(command, self.folder.parent, UV_CACHE_DIR=self._cache).returncode == 0

    def look(self, row: Row) -> None:
        """Fills in what is seen in it, away from the source tree."""
        outside = self.folder.parent
        done = run([self.python.with_name("gcahng"), "env", "--json"], outside)
        if done.returncode:
            row.cpu = "fails"
            return
        found = json.loads(done.stdout)
        row.torch, row.python = (found["versions"][name].split()[0] for name in ("torch", "Python"))
        built = re.search(r"built with CUDA ([\d.]+)", found["versions"]["torch"])
        row.torch_cuda = built[1] if built else "none"
        row.numpy = found["packages"]["numpy"]
        row.cpu, row.cuda = (_state(found["libraries"][name]) for name in ("_C_cpu", "_C_cuda"))
        row.readme = "fails" if run([self.python, "-c", readme_code()], outside).returncode else "runs"
        tests = [outside / "tests" / "golden", "-k", "not triton"]  # Triton's kernels are no part of what was built
        golden = run([self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], outside)
        last = golden.stdout.rstrip().rpartition("\n")[2]
        row.golden = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)\b", last)) or "fails"

    def remove(self) -> None:
        """Deletes it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def attempt(environment: Environment, made: bool, numpys: list[str]) -> list[Row]:
    """Looks into an environment with each numpy, and deletes it.

    Args:
        environment: what is looked into.
        made: whether it could be made; if not, one row says so.
        numpys: newest, or such as 1.26.
    """
    rows = []
    try:
        for numpy in numpys:
            if numpy != "newest" and environment.version in WITHOUT_OLD_NUMPY:
                continue
            row = Row(environment.torch, "", environment.version, numpy)
            rows.append(row)
            start = time.monotonic()
            if not made or (numpy != "newest" and not environment.install(f"numpy=={numpy}.*")):
                row.cpu = "not installed"
                break
            environment.look(row)
            row.seconds = time.monotonic() - start
            print("| " + " | ".join(row.cells()) + " |", flush=True)
    finally:
        environment.remove()
    return rows


def run(command: list[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder, with no other gcahng in sight. What a failing one prints is shown."""
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


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = (HEADING, ("---",) * len(HEADING), *(row.cells() for row in rows))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _state(library: dict[str, str | None]) -> str:
    """What `gcahng env --json` says of a library, in a word or two."""
    reason = library["not loaded"]
    if reason is None:
        return "loaded"
    if "was not built" in reason:
        return "not built"
    return "refused" if reason.endswith("install a CUDA build of torch") else "not loaded"
