"""A study's runs, each a process of `gcahng train`: started, resumed or left as they are, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

from gcahng.bounds import check_number
from gcahng.config import TrainConfig, config_of_run, config_to_dict
from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.files import Held, lock, remove_temporaries, write_json, write_text, writing
from gcahng.machine import usable_cpus
from gcahng.paths import check_parent, check_source, check_utf8
from gcahng.progress import Progress, no_progress
from gcahng.runs.metrics_table import metric_title
from gcahng.runs.run_folder import LOCK
from gcahng.runs.summary import read_summary
from gcahng.study.page import page
from gcahng.study.plan import Run, Study
from gcahng.study.results import as_csv, as_json, collect, command, measured, options_file, run_folder
from gcahng.yaml_files import load_yaml, read_yaml

SECONDS_TO_END = 120.0  # for a run to write its checkpoint after SIGTERM
SECONDS_FOR_LOCK = 30.0  # for the runs of a study that was killed to end
_PAUSE = 0.1
_PR_SET_PDEATHSIG = 1


class StudyStopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came; the runs have written their checkpoints."""

    exit_code = 130


@dataclass
class _Work:
    """What `finish_study` has at hand."""

    study: Study
    out: Path
    say: Callable[[str], None]
    progress: Progress
    going: dict[subprocess.Popen[bytes], Run] = field(default_factory=dict)
    failed: int = 0


def default_jobs() -> int:
    """One process for each processor that this one may use."""
    return usable_cpus()


def state(out: Path, run: Run) -> str:
    """How far a run is: "done", "begun" or "to do".

    Raises:
        UserError: what is in its folder is another run, or no run.
    """
    folder, options = run_folder(out, run), options_file(out, run)
    if options.exists() and _stored(options) != run.config:
        changed = _changed(_stored(options), run.config)
        if folder.exists():
            raise UserError(
                f"{folder} was made with another {changed} than methods.{run.method} on data.{run.data} has now; name "
                "another --out, or remove that folder"
            )
    if not folder.exists():
        return "to do"
    left = [entry.name for entry in folder.iterdir() if entry.name != LOCK and not entry.name.endswith(".tmp")]
    if not options.exists():
        raise UserError(f"{folder} is there, and no study made it; name another --out, or remove that folder")
    if read_summary(folder) is not None:
        return "done"
    return "begun" if left else "to do"


def finish_study(
    study: Study,
    out: Path | str,
    *,
    jobs: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = no_progress,
) -> int:
    """Train what is left of a study, and write its tables and its page; the same as `gcahng study`.

    A run that has finished is kept, one that was ended goes on from its last checkpoint, and the others are started.
    results.json, results.csv and study.html are written after each run.

    Args:
        study: what to train and to compare.
        out: the folder of the study, which holds runs/, options/, logs/ and the results.
        jobs: runs at a time; None: one for each processor.
        say: called with a line about each run.
        progress: called with the number of finished runs and of all.

    Returns:
        How many runs failed. Their output is in logs/.

    Raises:
        UserError: a run's folder holds another run, the folder is used by another study, or a file cannot be written.
        StudyStopped: a signal came.
    """
    require("yaml", "matplotlib", "scipy", extra="train", purpose="gcahng study")
    jobs = default_jobs() if jobs is None else jobs
    check_number("jobs", jobs)
    out = Path(out)
    check_source("out", out)
    check_parent("out", out)
    check_utf8("out", out, "YAML")
    _check_places(study)
    work = _Work(study, out, say, progress)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with _locked(out), _signals():
        left = [run for run in study.runs if state(out, run) != "done"]
        work.progress(len(study.runs) - len(left), len(study.runs))
        _write(work)
        try:
            _train(work, left, jobs)
        finally:
            _end(work)
        _write(work)
    return work.failed


def _check_places(study: Study) -> None:
    """See that the files of every data set are where the study says.

    Raises:
        UserError: they are not.
    """
    for run in study.runs:
        for name, place in (("root", run.config.data.root), ("csv", run.config.data.csv)):
            if place is not None and not Path(place).expanduser().exists():
                raise UserError(f"data.{run.data}: data.{name} is {place}, which does not exist; it must be the data's")


def _train(work: _Work, left: list[Run], jobs: int) -> None:
    waiting = list(left)
    while waiting or work.going:
        while waiting and len(work.going) < jobs:
            run = waiting.pop(0)
            work.going[_start(work, run)] = run
        ended = [process for process in work.going if process.poll() is not None]
        for process in ended:
            _note(work, work.going.pop(process), process.returncode)
        if ended:
            _write(work)
            work.progress(len(work.study.runs) - len(waiting) - len(work.going), len(work.study.runs))
        else:
            time.sleep(_PAUSE)


def _start(work: _Work, run: Run) -> subprocess.Popen[bytes]:
    folder, options = run_folder(work.out, run), options_file(work.out, run)
    log = work.out / "logs" / f"{run.name}.log"
    if (before := state(work.out, run)) == "begun":
        words = ["gcahng", "train", "--resume", str(folder)]
    else:
        if folder.exists():
            remove_temporaries(folder)
        with writing(options):
            write_text(options, _yaml(run.config))
        words = command(work.out, run)
    place = work.study.runs.index(run) + 1
    work.say(f"[{place}/{len(work.study.runs)}] {run.name}: {'goes on' if before == 'begun' else 'begins'}")
    with writing(log):
        log.parent.mkdir(exist_ok=True)
        output = open(log, "ab")  # noqa: SIM115  # closed below
    with output:
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # The threads that a library makes as it is loaded; those of PyTorch are an option of the run.
            env={**os.environ, "OMP_NUM_THREADS": str(run.config.threads or 1)},
            start_new_session=True,  # Ctrl-C is for the study, which ends its runs itself
            preexec_fn=partial(_end_with, os.getpid()) if sys.platform == "linux" else None,
        )


def _end_with(parent: int) -> None:
    """In a new process: have the system end it with SIGTERM when the study is gone, however that ended."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _note(work: _Work, run: Run, status: int) -> None:
    """Say what a run that has ended found."""
    name = f"[{work.study.runs.index(run) + 1}/{len(work.study.runs)}] {run.name}"
    summary = read_summary(run_folder(work.out, run)) if status == 0 else None
    if summary is None:
        work.failed += 1
        why = f"exit status {status}" if status else "it wrote no summary.json"
        work.say(f"{name}: failed ({why}); see {work.out / 'logs' / f'{run.name}.log'}")
        return
    values = measured(work.study, summary, run)
    shown = ", ".join(f"{metric_title(metric)} {100 * value:.2f}" for metric, value in values.items())
    work.say(f"{name}: {shown}")


def _end(work: _Work) -> None:
    """End the runs that still go on, which write their checkpoints first."""
    for process in work.going:
        process.terminate()
    deadline = time.monotonic() + SECONDS_TO_END
    for process in work.going:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _write(work: _Work) -> None:
    results = collect(work.study, work.out)
    with writing(work.out):
        write_json(work.out / "results.json", as_json(work.study, work.out, results))
        write_text(work.out / "results.csv", as_csv(work.study, results))
        write_text(work.out / "study.html", page(work.study, work.out, results))


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder for this study."""
    with writing(out / LOCK):
        file = open(out / LOCK, "a")  # noqa: SIM115  # closed below
    with file:
        lock(file, out, "used")
        # Runs of a study that was killed end by themselves, once they have written a checkpoint.
        deadline = time.monotonic() + SECONDS_FOR_LOCK
        while (held := _held_run(out)) is not None:
            if time.monotonic() > deadline:
                raise Held(f"{held} is being trained by another process; wait for its end, or end it")
            time.sleep(_PAUSE)
        yield


def _held_run(out: Path) -> Path | None:
    """A run that a process trains; None: there is none."""
    for path in sorted((out / "runs").glob(f"*/{LOCK}")):
        with open(path, "a") as file:
            try:
                lock(file, path.parent, "trained")
            except Held:
                return path.parent
    return None


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end the study in good order. Python handles signals in the main thread only."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # the runs are being ended already
        raise StudyStopped("the study was stopped; the same command goes on from here")

    names = ("SIGINT", "SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _yaml(config: TrainConfig) -> str:
    import yaml

    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def _stored(path: Path) -> TrainConfig:
    return config_of_run(load_yaml(read_yaml(path, str(path)), str(path)))


def _changed(first: TrainConfig, second: TrainConfig) -> str:
    """The name of the first option that two configurations differ in."""
    a, b = config_to_dict(first), config_to_dict(second)
    for name in a:
        if a[name] != b[name]:
            if isinstance(a[name], dict):
                return f"{name}.{next(option for option in a[name] if a[name][option] != b[name][option])}"
            return name
    return "configuration"
