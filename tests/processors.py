"""Runs tests as on other processors, and prints a table of what they say.

    python tests/processors.py tests/engine/test_lower_precision.py     # any arguments of pytest

Vendor libraries choose their code by the processor, and sum in another order on each. Environment variables make them
take the code for another one, so that a tolerance which holds here by luck can be found out. Each row of the table is
one run of pytest: the variables, what passed and failed, the seconds, and the largest share of its allowed error that
any comparison of `gcahng.testing` has used (above 1 it has failed).

A variable that asks for more than the processor has changes nothing, so run this on the newest one at hand. It is no
part of the default test run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARES = "GCAHNG_TEST_SHARES"  # a file for the plugin below: one "share name" per line
OLDEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "MKL_CBWR": "COMPATIBLE",
    "GCAHNG_CPU_ARCH": "base",
}
TWO_THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}  # tensors are small: threads mostly wait
PROCESSORS: list[dict[str, str]] = [
    {},
    TWO_THREADS,
    *({"ATEN_CPU_CAPABILITY": name} for name in ("default", "avx2", "avx512")),
    *({"ONEDNN_MAX_CPU_ISA": name} for name in ("AVX2", "AVX512_CORE", "ALL")),
    *({"MKL_ENABLE_INSTRUCTIONS": name} for name in ("AVX2", "AVX512")),
    *({"MKL_CBWR": name} for name in ("COMPATIBLE", "AVX2")),
    *({"GCAHNG_CPU_ARCH": name} for name in ("base", "avx2", "avx512")),
    OLDEST,
    OLDEST | TWO_THREADS,
]


def pytest_configure() -> None:
    """As a plugin of the runs below: writes down the share of its allowed error that each comparison uses."""
    from gcahng.testing import compare

    compare.observers.append(lambda name, share: shares.write(f"{share:.6g} {name}\n"))
    shares = open(os.environ[SHARES], "a", buffering=1)  # noqa: SIM115 (open until the process ends)


def run(arguments: list[str], variables: dict[str, str]) -> str:
    """One run of pytest under these variables, as a row of the table."""
    path = Path(__file__).resolve().parent
    environment = (
        {k: v for k, v in os.environ.items() if k not in OLDEST | TWO_THREADS} | {"OMP_NUM_THREADS": "1"} | variables
    )
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), environment.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        environment[SHARES] = str(Path(folder) / "shares")
        start = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "processors", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        found = Path(environment[SHARES])
        lines = found.read_text().splitlines() if found.exists() else []
    share, _, name = max(lines, key=lambda line: float(line.split()[0]), default="- -").partition(" ")
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-80:]])[-1]
    outcome = re.sub(r" in [\d.]+s.*", "", last)
    for failed in re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE):
        print(f"  {failed}", flush=True)
    called = " ".join(f"{k}={v}" for k, v in variables.items()) or "as it is"
    return f"| {called} | {outcome} | {seconds:.0f} | {share} | {name} |"


def main() -> None:
    print("| processor | outcome | seconds | worst share of the allowed error | where |\n|---|---|---:|---:|---|")
    for variables in PROCESSORS:
        print(run(sys.argv[1:], variables), flush=True)


if __name__ == "__main__":
    main()
