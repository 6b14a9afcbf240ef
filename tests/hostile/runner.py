"""Runs cases: each in a fork of this process, with limits on time and memory, and a verdict.

Forks start from a process that has imported everything and computed nothing, so that a case costs milliseconds and
OpenMP and autograd meet no fork.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hostile.case import FAULTS, FINE, REFUSED, Case, Fault, raised

Action = Callable[[Case], str]

# A case may use this many bytes beyond what the process has before it, and this much processor time. It hangs, too, if
# it only sleeps. Time on the wall says little on a busy machine and is a last resort.
MEMORY = 1 << 30
FILE_SIZE = 256 << 20
CPU_SECONDS = 40
WALL_SECONDS = 300.0
QUIET_SECONDS = 20.0


@dataclass(frozen=True)
class Result:
    """How a case ended.

    Attributes:
        group, number: which case it is, with the seed.
        outcome: "fine", "refused", or one of `case.FAULTS`.
        text: what was found.
        what: what was tried.
        seconds: the processor time.
        grown: how many bytes the resident memory grew by, at most.
    """

    group: str
    number: int
    outcome: str
    text: str
    what: str
    seconds: float
    grown: int

    @property
    def is_fault(self) -> bool:
        return self.outcome in FAULTS


@dataclass
class _Running:
    group: str
    number: int
    notes: Path
    folder: Path
    started: float = field(default_factory=time.monotonic)
    looked: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    used: tuple[int, ...] = ()

    def hangs(self, pid: int) -> bool:
        """Whether the case only waits, and has done so for long."""
        now = time.monotonic()
        if now - self.looked > 0.5:
            self.looked = now
            used, asleep = _use_of(pid)
            if used != self.used or not asleep:
                self.used, self.moved = used, now
        return now - self.moved > QUIET_SECONDS or now - self.started > WALL_SECONDS


class Runner:
    """Runs cases of groups, several at a time.

    Args:
        groups: what a case of each group does.
        seed: of all cases.
        world: the folder of good inputs.
        jobs: how many cases run at once.
    """

    def __init__(self, groups: dict[str, Action], seed: int, world: Path, jobs: int = 2) -> None:
        self._groups, self._seed, self._world, self._jobs = groups, seed, world, jobs
        self._place = Path(tempfile.mkdtemp(prefix="hostile-"))
        self._place.chmod(0o755)  # cases that drop their rights must reach their folders
        status = Path("/proc/self/status").read_text().split("\n")
        self._base = {line.split(":")[0]: int(line.split()[1]) << 10 for line in status if line.endswith(" kB")}

    def run(self, cases: Iterable[tuple[str, int]]) -> list[Result]:
        """Run cases, named by group and number; the results come in the order in which cases end.

        Ctrl-C ends the cases that run; the results so far are returned.
        """
        results: list[Result] = []
        running: dict[int, _Running] = {}
        try:
            self._run(iter(cases), running, results)
        except KeyboardInterrupt:
            for pid in running:
                _kill_group(pid)
                os.waitpid(pid, 0)
        return results

    def _run(self, waiting: Iterator[tuple[str, int]], running: dict[int, _Running], results: list[Result]) -> None:
        last = False
        while running or not last:
            while not last and len(running) < self._jobs:
                case = next(waiting, None)
                if case is None:
                    last = True
                    break
                pid, started = self._start(*case)
                running[pid] = started
            for pid in list(running):
                done, status, usage = os.wait4(pid, os.WNOHANG)
                started = running[pid]
                if not done and started.hangs(pid):
                    os.kill(pid, signal.SIGUSR2)  # faulthandler writes where it is
                    time.sleep(0.3)
                    _kill_group(pid)
                    _, status, usage = os.wait4(pid, 0)
                    done, status = pid, signal.SIGALRM
                if done:
                    results.append(self._result(running.pop(pid), status, usage))
                    _kill_group(pid)  # processes that the case left
            time.sleep(0.001)

    def close(self) -> None:
        """Remove what cases left."""
        shutil.rmtree(self._place, ignore_errors=True)

    def _start(self, group: str, number: int) -> tuple[int, _Running]:
        notes = Path(tempfile.mkdtemp(prefix=f"{group}-{number}-", dir=self._place))
        folder = notes / "case"
        folder.mkdir()
        notes.chmod(0o777)  # a case may drop its rights
        folder.chmod(0o777)
        pid = os.fork()
        if pid:
            return pid, _Running(group, number, notes, folder)
        try:
            os.setsid()
            self._limit(notes)
            os.chdir(folder)
            os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = str(folder / "home")
            chance = random.Random(f"{self._seed}/{group}/{number}")
            _seed_everything(chance)
            try:
                found = {"outcome": self._groups[group](Case(chance, self._world, folder, notes)), "text": ""}
            except BaseException as error:
                fault = error if isinstance(error, Fault) else raised(error)
                trace = traceback.format_exception(error if error.__cause__ is None else error.__cause__)
                (notes / "trace").write_text("".join(trace), encoding="utf-8", errors="backslashreplace")
                found = {"outcome": fault.kind, "text": str(fault)}
            (notes / "result").write_text(json.dumps(found))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(3)

    def _limit(self, notes: Path) -> None:
        for kind, value in (
            (resource.RLIMIT_DATA, self._base["VmData"] + MEMORY),
            (resource.RLIMIT_FSIZE, FILE_SIZE),
            (resource.RLIMIT_CPU, CPU_SECONDS),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (value, value))
        stacks = open(notes / "stacks", "w")  # noqa: SIM115  # faulthandler keeps it
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR2, stacks)
        faulthandler.register(signal.SIGXCPU, stacks, chain=True)

    def _result(self, case: _Running, status: int, usage: resource.struct_rusage) -> Result:
        try:
            found = json.loads((case.notes / "result").read_text())
        except (OSError, ValueError):
            number = status & 0x7F
            kind = "hang" if number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL) else "crash"
            said = _read(case.notes / "stacks").splitlines()[:8]
            found = {"outcome": kind, "text": f"{_name(status)}: {' | '.join(line.strip() for line in said)[:900]}"}
        grown = max(0, (usage.ru_maxrss << 10) - self._base["VmRSS"])
        if found["outcome"] in (FINE, REFUSED) and grown > MEMORY * 3 // 4:
            found = {"outcome": "memory", "text": f"{found['outcome']}, but memory grew by {grown >> 20} MiB"}
        what, outcome = _read(case.notes / "what").strip(), found["outcome"]
        text = found["text"]
        if outcome in FAULTS and os.environ.get("HOSTILE_TRACE"):
            text += "\n" + _read(case.notes / "trace")
        if not os.environ.get("HOSTILE_KEEP"):
            _remove(case.notes)
        seconds = usage.ru_utime + usage.ru_stime
        return Result(case.group, case.number, outcome, text, what, seconds, grown)


def in_a_fork(action: Callable[[], None]) -> None:
    """Run something in a process of its own, so that this one computes nothing.

    Raises:
        RuntimeError: it failed; its traceback is on standard error.
    """
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError("the good inputs could not be made")


def table(results: Sequence[Result]) -> str:
    """The count of each outcome by group."""
    groups = sorted({result.group for result in results})
    counts = {group: Counter(result.outcome for result in results if result.group == group) for group in groups}
    heads = ["group", "cases", FINE, REFUSED, *FAULTS, "CPU s"]
    rows = [heads]
    for group in [*groups, "all"]:
        of = sum(counts.values(), Counter()) if group == "all" else counts[group]
        own = [result for result in results if group in ("all", result.group)]
        numbers = [
            len(own),
            of[FINE],
            of[REFUSED],
            *(of[fault] for fault in FAULTS),
            round(sum(r.seconds for r in own)),
        ]
        rows.append([group, *map(str, numbers)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if at == 0 else cell.rjust(w) for at, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def repeat_command(seed: int, result: Result) -> str:
    """The command that runs one case again."""
    return f"python tests/hostile/run.py --seed {seed} --only {result.group} --number {result.number}"


def _use_of(pid: int) -> tuple[tuple[int, ...], bool]:
    """The processor time of a process and of all that it started, in ticks; and whether they all sleep."""
    used: tuple[int, ...] = ()
    asleep = True
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        try:
            text = Path(f"/proc/{one}/stat").read_text()
            waiting += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except (OSError, ValueError):
            continue
        fields = text.rpartition(")")[2].split()
        used += (one, int(fields[11]) + int(fields[12]))
        asleep = asleep and fields[0] in "ST"
    return used, asleep


def _seed_everything(chance: random.Random) -> None:
    import numpy as np
    import torch

    torch.manual_seed(chance.getrandbits(32))
    np.random.seed(chance.getrandbits(32))


def _name(status: int) -> str:
    if status & 0x7F:
        return signal.Signals(status & 0x7F).name
    return f"exit status {status >> 8} without a verdict"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="backslashreplace")
    except OSError:
        return ""


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _remove(folder: Path) -> None:
    for parent, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
