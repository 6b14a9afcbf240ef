"""Make a table of results: train each setting with several seeds, and average what the summaries of the runs say.

    python benchmarks/table.py readme                 # N-pair and GCA-HNG, three seeds
    python benchmarks/table.py wide --only 'npair*'   # part of a larger grid
    python benchmarks/table.py wide --dry-run         # what is done, what is left, and the commands

You can kill it at any time: the same command continues where it stopped. Each run is a process of its own, one at a
time, in a folder under `--out`. Runs that finished are kept, and one that did not is started again. After every run,
`table.md` and `table.json` are written again. Options after `--` go to every `gcahng train`, for example `-- --device
cuda`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nothing then keeps two of these from working in one folder.
    fcntl = None

# Runs a command, its output in the file, with the lock's file inherited; gives the exit status.
Runner = Callable[[Sequence[str], Path, int | None], int]

METRICS = {"recall@1": "R@1", "map@r": "MAP@R", "r_precision": "R-Precision"}
BASES = ("npair", "proxy_anchor", "supcon", "arcface")


@dataclass(frozen=True)
class Setting:
    """One row of the table: a name, and the options of `gcahng train` that make it.

    A setting with `as_long_as` trains for as many steps as take the time of that other setting (see `step_time`).
    `like` names a setting with the same options, whose time for a step says how many steps these are.
    """

    name: str
    options: tuple[str, ...]
    like: str | None = None
    as_long_as: str | None = None


def readme_settings() -> list[Setting]:
    """The two rows of the README."""
    return [Setting("npair", ("--loss", "npair")), Setting("gca_hng", ("--loss", "gca_hng"))]


def wide_settings() -> list[Setting]:
    """Four losses, alone and under GCA-HNG, in small and large batches: for equal steps, then alone for equal time."""
    equal_steps, equal_time = [], []
    for classes in (16, 64):
        for base in BASES:
            batch = ("--data.classes_per_batch", str(classes))
            alone, under = f"{base}-c{classes}", f"gca_hng-{base}-c{classes}"
            equal_steps.append(Setting(alone, ("--loss", base, *batch)))
            equal_steps.append(Setting(under, ("--loss", "gca_hng", "--gca.base", base, *batch)))
            equal_time.append(Setting(f"{alone}-equal_time", ("--loss", base, *batch), like=alone, as_long_as=under))
    return equal_steps + equal_time


PRESETS: dict[str, Callable[[], list[Setting]]] = {"readme": readme_settings, "wide": wide_settings}


def step_time(summary: dict[str, Any]) -> float:
    """The seconds of a run's training steps, without set-up and evaluation. On the CPU it is the CPU time, which a busy
    machine does not lengthen."""
    return summary["step_cpu_seconds" if summary["device"] == "cpu" else "step_seconds"]


class TableError(Exception):
    """A mistake of the person who runs this, in one line that says what to change."""


class Table:
    """The runs of one output folder, one for each setting and seed, and how far each is.

    Args:
        out: the folder of the runs, the logs and the table.
        settings: all settings of the preset.
        seeds: each setting has one run for each seed.
        extra: options for every run.
    """

    def __init__(self, out: Path, settings: Sequence[Setting], seeds: Sequence[int], extra: Sequence[str] = ()):
        self.out = out
        self.settings = {setting.name: setting for setting in settings}
        self.seeds = list(seeds)
        self.extra = list(extra)

    def run_dir(self, setting: Setting, seed: int) -> Path:
        return self.out / "runs" / f"{setting.name}-seed{seed}"

    def record(self, setting: Setting, seed: int) -> Path:
        """Where the options of a run are stored, so that a result is never taken for one of other options."""
        return self.out / "options" / f"{setting.name}-seed{seed}.json"

    def options(self, setting: Setting, seed: int) -> list[str] | None:
        """The options of one run. None as long as the runs that its number of steps follows from are not finished."""
        steps: list[str] = []
        if setting.as_long_as is not None:
            pace = self.summary(self.settings[setting.like], seed)
            goal = self.summary(self.settings[setting.as_long_as], seed)
            if pace is None or goal is None:
                return None
            steps = ["--steps", str(max(1, round(pace["steps"] * step_time(goal) / step_time(pace))))]
        return [*setting.options, *self.extra, *steps, "--seed", str(seed)]

    def command(self, setting: Setting, seed: int) -> list[str] | None:
        """`gcahng train ...` for one run; None as in `options`."""
        options = self.options(setting, seed)
        return None if options is None else self._command(setting, seed, options)

    def _command(self, setting: Setting, seed: int, options: Sequence[str]) -> list[str]:
        return ["gcahng", "train", *options, "--out", str(self.run_dir(setting, seed))]

    def summary(self, setting: Setting, seed: int) -> dict[str, Any] | None:
        """The summary of a finished run, or None; TableError where it was made with other options."""
        summary = _read_json(self.run_dir(setting, seed) / "summary.json")
        if summary is None:
            return None
        made_with = _read_json(self.record(setting, seed))
        if made_with is None:
            raise TableError(f"{self.run_dir(setting, seed)} was not made by this script; choose another --out")
        wanted = self.options(setting, seed)
        if wanted is not None and made_with != wanted:
            raise TableError(
                f"{self.run_dir(setting, seed)} was made with `{shlex.join(made_with)}`, not `{shlex.join(wanted)}`; "
                "choose another --out, or delete it"
            )
        return summary

    def prepare(self, setting: Setting, seed: int, options: Sequence[str]) -> list[str]:
        """Remove an unfinished run, note the options, and return the command."""
        run_dir, record = self.run_dir(setting, seed), self.record(setting, seed)
        if run_dir.exists():
            if not record.exists():
                raise TableError(f"{run_dir} was not made by this script; choose another --out")
            shutil.rmtree(run_dir)
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        _write(record, json.dumps(options) + "\n")
        return self._command(setting, seed, options)

    def rows(self) -> list[dict[str, Any]]:
        """The finished settings, each with its runs and their mean and sample standard deviation."""
        rows = []
        for setting in self.settings.values():
            runs = []
            for seed in self.seeds:
                summary = self.summary(setting, seed)
                if summary is not None:
                    values = {name: summary["test"][name] for name in METRICS}
                    values |= {"seconds": step_time(summary), "steps": summary["steps"]}
                    made_with = self._command(setting, seed, _read_json(self.record(setting, seed)))
                    runs.append({"seed": seed, "command": shlex.join(made_with), **values})
            columns = {name: [run[name] for run in runs] for name in (*METRICS, "seconds", "steps")}
            rows.append(
                {
                    "setting": setting.name,
                    "runs": runs,
                    "mean": {name: statistics.fmean(values) for name, values in columns.items() if values},
                    "std": {name: statistics.stdev(values) for name, values in columns.items() if len(values) > 1},
                }
            )
        return rows

    def write(self) -> None:
        """Write table.json and table.md."""
        rows = self.rows()
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
        _write(self.out / "table.json", json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
        _write(self.out / "table.md", markdown(rows, machine))


def markdown(rows: Sequence[dict[str, Any]], machine: str) -> str:
    """The rows as a Markdown table, with the command of every run below."""
    lines = [
        f"| setting | {' | '.join(METRICS.values())} | steps | seconds | runs |",
        f"|---|{'---:|' * (len(METRICS) + 3)}",
    ]
    for row in rows:
        cells = [_mean_and_std(row, name, factor=100, digits=2) for name in METRICS]
        cells += [_mean_and_std(row, "steps", digits=0), _mean_and_std(row, "seconds", digits=0)]
        lines.append(f"| {row['setting']} | {' | '.join(cells)} | {len(row['runs'])} |")
    lines += [
        "",
        "Metrics in per cent on the test classes, from the last checkpoint; mean ± sample standard deviation over the "
        f"seeds. Seconds are those of the training steps (on a CPU: of all threads together), without set-up and "
        f"evaluation, on: {machine}.",
        "",
        "```sh",
        *(run["command"] for row in rows for run in row["runs"]),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _mean_and_std(row: dict[str, Any], name: str, *, factor: float = 1, digits: int) -> str:
    """ "mean ± std"; only the mean for a single run or for equal steps; a dash without a run."""
    if name not in row["mean"]:
        return "–"
    mean = f"{factor * row['mean'][name]:.{digits}f}"
    if name not in row["std"] or (name == "steps" and row["std"][name] == 0):
        return mean
    return f"{mean} ± {factor * row['std'][name]:.{digits}f}"


def run_logged(command: Sequence[str], log: Path, lock: int | None) -> int:
    """Run `gcahng ...` with this Python, with its output in `log`, and return the exit status.

    The process inherits the open file `lock`. So if this script is killed, the folder stays locked until its last run
    ends.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=() if lock is None else (lock,),
        )
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int | None]:
    """Hold the folder for this process and those that inherit the file.

    Raises:
        TableError: another process holds it.
    """
    if fcntl is None:
        yield None
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TableError(f"{out} is in use by another run of this script; wait, or choose another --out") from None
        yield file.fileno()


def show_plan(table: Table, selected: Sequence[Setting]) -> None:
    """Print each selected run's state and command, and how many are left."""
    left = 0
    for setting in selected:
        for seed in table.seeds:
            command = table.command(setting, seed)
            if command is None:
                state, text = "waits", f"for {setting.like} and {setting.as_long_as}, seed {seed}"
            else:
                done = table.summary(setting, seed) is not None
                state = "done" if done else "unfinished" if table.run_dir(setting, seed).exists() else "to do"
                text = shlex.join(command)
            left += state != "done"
            print(f"{state:<10}  {text}")
    print(f"{left} of {len(selected) * len(table.seeds)} runs left")


def run_all(table: Table, selected: Sequence[Setting], run: Runner, lock: int | None) -> int:
    """Run what is left, one after the other, and write the table after each. Returns how many runs failed."""
    failed, number, total = 0, 0, len(selected) * len(table.seeds)
    for setting in selected:
        for seed in table.seeds:
            number += 1
            name = f"[{number}/{total}] {setting.name} seed {seed}"
            options = table.options(setting, seed)
            if options is None:
                print(f"{name}: needs {setting.like} and {setting.as_long_as} first", flush=True)
                failed += 1
                continue
            if table.summary(setting, seed) is None:
                command = table.prepare(setting, seed, options)
                print(f"{name}: {shlex.join(command)}", flush=True)
                log = table.out / "logs" / f"{setting.name}-seed{seed}.log"
                status = run(command, log, lock)
                if status != 0 or table.summary(setting, seed) is None:
                    why = f"exit status {status}" if status else "no summary.json"
                    print(f"{name}: failed ({why}), see {log}", flush=True)
                    failed += 1
                    continue
            summary = table.summary(setting, seed)
            values = ", ".join(f"{title} {100 * summary['test'][key]:.2f}" for key, title in METRICS.items())
            print(f"{name}: {values} in {summary['seconds']:.0f} s", flush=True)
            table.write()
    table.write()
    return failed


def _read_json(path: Path) -> Any:
    """What a JSON file holds; None if there is no file, or if it was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def _write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    argv = list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--out", type=Path, help="folder for runs and table (default: runs/table-PRESET)")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="settings whose name matches, such as 'npair*'")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--mode", choices=("steps", "time", "both"), default="both", help="equal steps, time, or both")
    parser.add_argument("--dry-run", action="store_true", help="print what is done, what is left and the commands")
    return parser.parse_args(argv[:at]), argv[at + 1 :]


def _select(settings: Sequence[Setting], only: Sequence[str] | None, mode: str) -> list[Setting]:
    selected = [
        setting
        for setting in settings
        if (mode == "both" or (setting.as_long_as is not None) == (mode == "time"))
        and (only is None or any(fnmatch(setting.name, pattern) for pattern in only))
    ]
    if not selected:
        names = ", ".join(setting.name for setting in settings)
        raise TableError(f"--only {' '.join(only or [])} --mode {mode} selects nothing out of: {names}")
    return selected


def _stop(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None, run: Runner = run_logged) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 if all selected runs are finished, 1 if some failed, 2 after a mistake in the arguments, 130
        if stopped.
    """
    arguments, extra = _parse(sys.argv[1:] if argv is None else argv)
    out = arguments.out or Path("runs") / f"table-{arguments.preset}"
    started = time.monotonic()
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        settings = PRESETS[arguments.preset]()
        selected = _select(settings, arguments.only, arguments.mode)
        table = Table(out, settings, arguments.seeds, extra)
        if arguments.dry_run:
            show_plan(table, selected)
            return 0
        out.mkdir(parents=True, exist_ok=True)
        with locked(out) as lock:
            failed = run_all(table, selected, run, lock)
    except TableError as error:
        print(f"table: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("table: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{failed} failed; {time.monotonic() - started:.0f} s; {out / 'table.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
