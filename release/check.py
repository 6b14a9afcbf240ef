"""Builds a release, checks its files, and tries the wheel in fresh environments.

    python -m pip install -r release/requirements.txt
    python release/check.py                                  all of it
    python release/check.py --torch 2.10 --python 3.11       one environment
    python release/check.py --wheel dist/gcahng-….whl        a wheel that is there already
    python release/check.py --record docs/support.md         writes what was seen into the table there

uv makes the environments: each gets one torch, and is deleted afterwards. uv downloads the next one's packages while an
environment is tried, and keeps what they share once, in a temporary cache or in UV_CACHE_DIR. Other variables of uv
count too: UV_TORCH_BACKEND=cpu or UV_FIND_LINKS give smaller builds of torch.

In each environment these things must hold: `gcahng env` exits with 0; _C_cpu is loaded; _C_cuda, if the wheel has it,
is loaded beside a torch with CUDA and refused beside one without; README's Python blocks run; the golden tests pass.
numpy 1.26 is tried in the same environment, after the newest, where it has wheels. The exit status is 1 if anything
failed. On a machine that others use, too, OMP_NUM_THREADS=1 helps: threads that share a processor wait for each other.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distributions import PLATFORM, ROOT, build, faults_of_sdist, faults_of_wheel
from environments import Environment, Row, attempt, table

TORCHES = ("2.10", "2.11", "2.12", "2.13", "2.14", "newest")
NUMPYS = ("newest", "1.26")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
BEGIN, END = "<!-- release/check.py -->", "<!-- /release/check.py -->"


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


def tried(pairs: list[tuple[str, str]], pythons: dict[str, str], options: argparse.Namespace, wheel: Path) -> list[Row]:
    """Tries a wheel in an environment for each pair; while one is tried, the next one is made.

    Args:
        pairs: a torch and a Python each.
        pythons: the interpreters.
        options: of the command line.
        wheel: what is tried.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as ahead:
        folder = Path(name)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        environments = [
            Environment(folder / f"environment-{k}", pythons[python], torch, wheel, folder / "cache")
            for k, (torch, python) in enumerate(pairs)
        ]
        making = [ahead.submit(environment.make) for environment in environments[:1]]
        for environment, following in zip(environments, [*environments[1:], None], strict=True):
            made = making.pop().result()
            if following is not None:
                making.append(ahead.submit(following.make))
            rows += attempt(environment, made, options.numpy)
    return rows


def recorded(page: str, text: str) -> str:
    """A page with a text in the place that is kept for it.

    Raises:
        ValueError: the page has no such place.
    """
    before, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"it has no lines {BEGIN} and {END}; the table is written between them")
    return f"{before}{begin}{text}\n{end}{after}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=list(TORCHES), help="such as 2.10, or newest")
    parser.add_argument("--python", nargs="+", default=list(PYTHONS), help="those of them that are here")
    parser.add_argument("--numpy", nargs="+", default=list(NUMPYS), help="such as 1.26, or newest")
    parser.add_argument("--wheel", type=Path, help="check this repaired wheel and build nothing")
    parser.add_argument("--platform", default=PLATFORM, help="what the wheel has to be for (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="where files are built (default: dist)")
    parser.add_argument("--no-environments", action="store_true", help="check the files alone")
    parser.add_argument("--record", type=Path, metavar="PAGE", help="write the table there, such as docs/support.md")
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
    if options.record:
        try:
            recorded(options.record.read_text(encoding="utf-8"), "")
        except (OSError, ValueError) as error:
            print(f"--record is {options.record}, which is no page for it: {error}", file=sys.stderr)
            return 2
    start = time.monotonic()
    if options.wheel:
        wheel, faults = options.wheel.resolve(), []
    else:
        sdist, wheel = build(options.output.resolve(), options.platform)
        faults = faults_of_sdist(sdist)
    faults += faults_of_wheel(wheel, options.platform)
    pairs = [] if options.no_environments else plan(options.torch, list(pythons))
    rows = tried(pairs, pythons, options, wheel)
    print(f"\n{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB\n\n{table(rows)}\n")
    if options.record:
        page = options.record.read_text(encoding="utf-8")
        options.record.write_text(recorded(page, table(rows)), encoding="utf-8")
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
