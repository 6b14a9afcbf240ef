"""Everything worth knowing in the first minutes on a GPU: build, quick check, and what the engine takes on the card.

    python benchmarks/gpu.py                        # about eight minutes in all
    python benchmarks/gpu.py --no-build --no-check --budget 300
    python benchmarks/gpu.py --show benchmarks/results/gpu-h100.json

It measures what the card can do (matrix products, a copy), every stage of the engine in every implementation, and the
time, the peak memory and the ratio to the reference of whole training steps, for batches from 81 to 4,096. The most
important measurements come first, and what does not fit into the budget is listed as dropped. A case that disagrees
with the reference in fp64 gets no ratio. The JSON file is written again after every piece of work, so a run that is cut
off keeps what it has.

Without a GPU (or with --dry) it goes through all of that on the CPU in tiny sizes, which measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _gpu_items import PARTS, Item, describe, items  # noqa: E402
from _gpu_tables import add_derived, report  # noqa: E402
from _gpu_worker import Worker  # noqa: E402

from gcahng.dispatch import AUTO  # noqa: E402
from gcahng.errors import UserError  # noqa: E402
from gcahng.paths import check_target  # noqa: E402

SECTIONS = ("ceilings", "plan", "step", "stages", "products")
CHECK_SECONDS, SUMMARY_SECONDS, CHECK_WORKERS, RETRIES = 120, 15, 8, 4


def main(argv: Sequence[str] | None = None, make_worker: Callable[[], Any] = Worker) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 if everything was measured, or dropped when time was short; 1 if something failed; 130 if the
        run was stopped.
    """
    start = time.monotonic()
    parser = _parser()
    options = parser.parse_args(argv)
    if options.show:
        try:
            print(report(json.loads(options.show.read_text(encoding="utf-8"))))
        except OSError as error:
            parser.error(f"--show {options.show} cannot be read: {error.strerror or error}")
        except (ValueError, KeyError, TypeError):
            parser.error(f"--show {options.show} is not a file that this command wrote")
        return 0
    if not options.budget >= 0:
        parser.error(f"--budget is {options.budget}; it must be seconds, at least 0")
    if options.json:
        try:
            check_target("--json", options.json)
        except UserError as error:
            parser.error(str(error))
    import torch

    dry = options.dry or not torch.cuda.is_available()
    if dry:
        why = "as asked" if options.dry else "torch sees no CUDA device"
        print(f"Dry run on the CPU in tiny sizes ({why}): it tries the code and measures nothing.", flush=True)
    os.environ.pop(AUTO, None)  # what it should say is asked here
    deadline = start + options.budget
    found: dict[str, Any] = {"dry": dry, "budget": options.budget, "settings": {}, "dropped": [], "failed": []}
    found |= {section: [] for section in SECTIONS}
    if options.build and not dry:
        found["build"] = _build()
    _describe(found)
    path = options.json or _results(found)
    write(path, found)
    if options.check and not dry:
        found["check"] = _check(min(CHECK_SECONDS, deadline - time.monotonic()))
    wanted = _items(found, dry)
    worker, before = make_worker(), signal.signal(signal.SIGTERM, _stop)
    stopped = False
    try:
        measure(wanted, worker, deadline, found, lambda: write(path, found))
    except KeyboardInterrupt:
        stopped = True
    finally:
        worker.close()
        signal.signal(signal.SIGTERM, before)
    found["seconds"] = time.monotonic() - start
    write(path, found)
    print(f"\n{report(found)}\n\nwritten {path}")
    return 130 if stopped else 1 if _went_wrong(found) else 0


def measure(
    wanted: Sequence[Item],
    worker: Any,
    deadline: float,
    found: dict[str, Any],
    save: Callable[[], None],
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Measure the items that fit before the deadline, in order, and list the others as dropped.

    A part's items must fit before the part's own deadline. Those that do not are tried again after all others.
    """
    queue = [item | {"number": number, "without": []} for number, item in enumerate(wanted)]
    begin = now()
    while queue:
        item = queue.pop(0)
        share = 1.0 if item.get("late") else PARTS.get(item.get("part"), 1.0)
        left, name = begin + share * (deadline - begin) - now(), describe(item)
        if left < item["guess"]:
            if share < 1:
                queue.append(item | {"late": True})
            else:
                found["dropped"].append(name)
            save()
            continue
        print(f"{now() - deadline + found['budget']:5.0f} s  {name}", file=sys.stderr, flush=True)
        answer = worker.run(item, min(left, max(60.0, 5 * item["guess"])))
        if answer.rows is not None:
            found[item["section"]] += [row | {"item": item["number"]} for row in answer.rows]
        else:
            found["failed"].append({"item": name, "case": answer.doing, "reason": answer.reason})
            known = answer.doing is not None and answer.doing not in item["without"]
            if known and len(item["without"]) < RETRIES:  # the others of this item, without the one that failed
                queue.insert(0, item | {"without": [*item["without"], answer.doing]})
        add_derived(found)
        save()


def write(path: Path, found: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


# -- before anything is measured


def _build() -> dict[str, Any]:
    """Build the native libraries for this card only."""
    from gcahng.bench.system import card

    environment, begin = dict(os.environ), time.monotonic()
    capability = card().get("compute capability", "").replace(".", "")
    arguments = environment.get("CMAKE_ARGS", "")
    if capability and "GCAHNG_CUDA_ARCHITECTURES" not in arguments:
        target = f"{capability}a-real" if capability in ("90", "100", "103") else f"{capability}-real"
        environment["CMAKE_ARGS"] = f"{arguments} -DGCAHNG_CUDA_ARCHITECTURES={target}".strip()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    print(f"{shlex.join(command)}  (CMAKE_ARGS={environment.get('CMAKE_ARGS', '')!r})", file=sys.stderr, flush=True)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    left_out = re.findall(r"^gcahng: (.* is left out: .*)$", done.stdout, re.M)
    found = {"status": done.returncode, "seconds": time.monotonic() - begin, "left_out": left_out}
    if done.returncode or left_out:
        print(done.stdout[-6000:], file=sys.stderr, flush=True)
    return found


def _check(limit: float, tests: Sequence[str] = ("tests/gpu", "tests/stages")) -> dict[str, Any]:
    """Run the GPU's quick tests, several at a time if pytest-xdist is installed, since most of their time goes into
    compiling kernels. If the limit ends before they do, say what failed until then."""
    options = ["-o", "addopts=", "-p", "no:cacheprovider"]  # pyproject.toml's options need pytest-xdist
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", *tests, *options]
    workers = min(CHECK_WORKERS, (os.cpu_count() or 1) // 2)
    if workers > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers)]
    print(shlex.join(command), file=sys.stderr, flush=True)
    begin = time.monotonic()
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipe)
    try:
        out, _ = process.communicate(timeout=max(1.0, limit))
        status: int | str = process.returncode
    except subprocess.TimeoutExpired:
        status = f"cut off after {limit:.0f} s"
        process.send_signal(signal.SIGINT)  # pytest ends with its summary then
        try:
            out, _ = process.communicate(timeout=SUMMARY_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, _ = process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing of them may run beside what is measured
            os.killpg(process.pid, signal.SIGKILL)
    lines = [line for line in out.strip().splitlines() if not line.startswith("(to show a full traceback")] or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if status != 0:
        print(out[-8000:], file=sys.stderr, flush=True)
    return {"status": status, "seconds": time.monotonic() - begin, "summary": lines[-1], "failed": failed}


def _describe(found: dict[str, Any]) -> None:
    """Note the card, the versions, and which implementations run here."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from gcahng.bench import system
    from gcahng.dispatch import available

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    card = {} if found["dry"] else system.card()
    found["settings"] = {**card, **system.settings(), "triton": triton, "CUDA": torch.version.cuda or "none"}
    device = "cpu" if found["dry"] else "cuda"
    names = ("triton", "cpp", "torch") if found["dry"] else ("cuda", "triton", "torch")
    reasons = {name: available(name, device) for name in names}
    found["implementations"] = [name for name, reason in reasons.items() if reason is None]
    found["unavailable"] = {name: reason for name, reason in reasons.items() if reason is not None}


def _items(found: dict[str, Any], dry: bool) -> list[Item]:
    from gcahng import GCAHNGLoss

    impls = found["implementations"]
    ops = [name for name in impls if name != "torch"]
    if not dry and {"cuda", "triton"} <= set(impls):
        impls = ["auto", *impls]  # CUDA C++ for what is row-wise, Triton for the edge MLP
    graphs = "cuda_graph" in inspect.signature(GCAHNGLoss).parameters
    return items(impls, ops, "cpu" if dry else None, graphs)


def _results(found: dict[str, Any]) -> Path:
    """The file of results, which is named after the card. That of a dry run is in the folder for temporary files."""
    if found["dry"]:
        return Path(tempfile.gettempdir()) / "gpu-dry.json"
    return ROOT / "benchmarks" / "results" / f"gpu-{_card_name(found)}.json"


def _card_name(found: dict[str, Any]) -> str:
    """A name such as h100-80gb-hbm3."""
    name = found["settings"].get("card", "unknown").lower().replace("nvidia", "")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"


def _went_wrong(found: dict[str, Any]) -> bool:
    """Whether anything failed. Running out of memory and dropping items when time is short are no failures."""
    rows = [row for section in SECTIONS for row in found[section]]
    broken = any(row.get("failed") not in (None, "out of memory") or row.get("disagrees") for row in rows)
    unsound = found.get("build", {}).get("left_out") or found.get("check", {}).get("status", 0) != 0
    return bool(broken or unsound or found["failed"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480, help="seconds, build and check included (480)")
    parser.add_argument("--no-build", dest="build", action="store_false", help="take the native libraries as they are")
    parser.add_argument("--no-check", dest="check", action="store_false", help="run no tests first")
    parser.add_argument("--dry", action="store_true", help="run on the CPU with tiny sizes (the default without a GPU)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write (benchmarks/results/gpu-<card>.json)")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="only print the tables of a file that an earlier run wrote"
    )
    return parser


def _stop(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
