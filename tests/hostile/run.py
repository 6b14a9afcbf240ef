"""Try hostile inputs, and count what happens.

    python tests/hostile/run.py                             # 1,200 cases of seed 0
    python tests/hostile/run.py --seed 7 --cases 5000       # others, and more
    python tests/hostile/run.py --only vectors states       # some groups alone
    python tests/hostile/run.py --seed 7 --only vectors --number 12    # one case again, with its traceback

Each case follows from the seed, its group and its number alone, and runs in a process of its own with limits on time
and memory. It is fine if the library did what was asked, and right where the harness knows the answer; refused if there
was one line of error, with the exit status of a mistake, and nothing half done. Everything else is a fault: a crash, a
hang, a traceback, too much memory, an error that is not one line (manners), a wrong answer, or state or files that are
half changed. Faults are listed below the table, each with the command that repeats it. The exit status is 1 if there
are any.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # forks, and cases that run side by side
os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="hostile-mpl-")
atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)  # forks leave by os._exit
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
if sys.path[2] == str(Path(__file__).parent):  # whose modules have the names of others
    del sys.path[2]

from hostile import groups, runner, world  # noqa: E402
from hostile.case import contents  # noqa: E402


def main() -> int:
    """Run cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of all cases (0)")
    parser.add_argument("--cases", type=int, default=1200, help="number of cases, shared out among the groups (1200)")
    parser.add_argument("--only", nargs="+", choices=groups.GROUPS, default=list(groups.GROUPS), metavar="GROUP")
    parser.add_argument("--number", type=int, help="one case of each group")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (2)")
    parser.add_argument("--list", type=Path, metavar="FILE", help="write one line for each case")
    parser.add_argument("--plant", action="store_true", help="cases that commit each kind of fault, instead")
    options = parser.parse_args()
    if options.plant:
        return report(options.seed, try_planted(), 0.0)
    chosen = groups.share(options.cases, options.only)
    if options.number is not None:
        chosen = [(name, options.number) for name in options.only]
        os.environ["HOSTILE_TRACE"] = "1"
    began = time.monotonic()
    results = try_cases(options.seed, chosen, options.jobs)
    if options.list is not None:
        fields = (
            (r.group, r.number, r.outcome, f"{r.seconds:.2f}", r.grown >> 20, repr(r.what), repr(r.text))
            for r in results
        )
        options.list.write_text("".join("\t".join(map(str, own)) + "\n" for own in fields), errors="backslashreplace")
    return report(options.seed, results, time.monotonic() - began)


def report(seed: int, results: list[runner.Result], seconds: float) -> int:
    """Print the table and the faults; returns the exit status."""
    print(runner.table(results))
    faults = [result for result in results if result.is_fault]
    for result in faults:
        print(f"\n{result.outcome}: {result.text}\n  tried: {result.what}\n  {runner.repeat_command(seed, result)}")
    print(f"\n{len(results)} cases, {len(faults)} faults, {seconds:.0f} s, seed {seed}")
    return 1 if faults else 0


def try_planted() -> list[runner.Result]:
    """Cases that commit the faults themselves, with a short wait for the one that hangs."""
    from hostile import planted

    runner.QUIET_SECONDS = 1.0
    running = runner.Runner(planted.ACTIONS, 0, Path.cwd(), len(planted.ACTIONS))
    try:
        return running.run([(name, 0) for name in planted.ACTIONS])
    finally:
        running.close()


def try_cases(seed: int, cases: list[tuple[str, int]], jobs: int = 2) -> list[runner.Result]:
    """Make the good inputs, and run cases on them. No case may change them."""
    import torch

    torch.set_num_threads(1)
    world.import_everything()
    with tempfile.TemporaryDirectory(prefix="hostile-world-") as place:
        runner.in_a_fork(lambda: world.build(Path(place)))
        before = contents(Path(place))
        running = runner.Runner(groups.ACTIONS, seed, Path(place), jobs)
        try:
            results = running.run(cases)
        finally:
            running.close()
        after = contents(Path(place))
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        text = f"inputs that are only read were changed: {', '.join(changed[:5])}"
        results.append(runner.Result("world", 0, "half-changed", text, "all cases", 0.0, 0))
    return results


if __name__ == "__main__":
    sys.exit(main())
