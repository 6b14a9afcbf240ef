"""Signals at any moment of a run or of a file being written, after which the same command ends it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hostile.case import FINE, Case, Fault, no_temporaries
from hostile.world import config

# Signals, and the statuses with which a run may end after them; None: by the signal itself.
_SIGNALS: dict[str, tuple[list[int], set[int | None]]] = {
    "Ctrl-C": ([signal.SIGINT], {130}),
    "Ctrl-C twice": ([signal.SIGINT, signal.SIGINT], {130}),
    "TERM": ([signal.SIGTERM], {143, None}),
    "TERM twice": ([signal.SIGTERM, signal.SIGTERM], {143, None}),
    "USR1": ([signal.SIGUSR1], {138, 143, None}),
    "HUP": ([signal.SIGHUP], {129, None}),
    "KILL": ([signal.SIGKILL], {None}),
    "stop and continue": ([signal.SIGSTOP, signal.SIGCONT], set()),
    "window": ([signal.SIGWINCH], set()),
}
_SECONDS = 0.8  # about what such a command takes


def case(case: Case) -> str:
    """One signal, or two, at a random moment."""
    return case.chance.choice((_training, _training, _embedding, _indexing))(case)


def _send(case: Case, action: Callable[[], int], name: str) -> int | None:
    """Run `action` in a fork that gets signals; returns its status, None if a signal ended it."""
    numbers, _ = _SIGNALS[name]
    after = case.chance.uniform(0, _SECONDS)
    between = case.chance.choice((0.0, 0.01, 0.1))
    case.tell(f"{name} after {after:.2f} s")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with open(case.notes / "signal-err", "w") as err, open(os.devnull, "w") as out:
                os.dup2(err.fileno(), 2)
                os.dup2(out.fileno(), 1)
                status = action()
                sys.stdout.flush()
                sys.stderr.flush()
        finally:
            os._exit(status)
    time.sleep(after)
    for number in numbers:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        os.kill(pid, number)
        time.sleep(between)
    _, status = os.waitpid(pid, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _check(case: Case, name: str, status: int | None) -> None:
    said = (case.notes / "signal-err").read_text(errors="backslashreplace")
    if "Traceback" in said:
        raise Fault("traceback", f"after {name}: {' | '.join(said.strip().splitlines()[-4:])[:600]}")
    if status not in (_SIGNALS[name][1] | {0}):
        raise Fault("manners", f"status {status} after {name}: {said.strip()[-300:]}")


def _training(case: Case) -> str:
    """A run that is signalled and goes on ends with the bits of one that is not."""
    from killed_runs import differences

    from gcahng.cli import main
    from gcahng.runs.checkpoint import load_checkpoint
    from gcahng.train.loop import CONFIG

    run = case.folder / "run"
    options = case.folder / "options.yaml"
    _write(options, run, case.world / "folder")
    name = case.chance.choice(sorted(_SIGNALS))
    status = _send(case, lambda: main(["train", "--config", str(options)]), name)
    _check(case, name, status)
    if status in (130, 143) and (run / "checkpoints").is_dir():
        said = (case.notes / "signal-err").read_text(errors="backslashreplace")
        if "--resume" not in said and "twice" not in name:
            raise Fault("manners", f"no command that continues the run: {said.strip()[-300:]}")
    begun = (run / CONFIG).is_file() or (run / "checkpoints").is_dir()
    if run.is_dir() and not begun:
        for path in run.iterdir():  # what a user removes who starts again
            path.unlink()
    ran = case.command("train", "--resume", run) if begun else case.command("train", "--config", options)
    if ran.status:
        raise Fault("wrong", f"the run does not go on: {ran.err.strip()[-400:]}")
    no_temporaries(case.folder)
    got, right = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (run, case.world / "run"))
    for state in (got, right):
        for field in ("config", "seconds", "resumed", "step_seconds", "step_cpu_seconds", "versions"):
            state.pop(field, None)
    if found := [difference for difference in differences(got, right) if "seconds" not in difference]:
        raise Fault("wrong", f"a run that went on has other bits: {found[:4]}")
    return FINE


def _write(options: Path, run: Path, root: Path) -> None:
    import yaml

    from gcahng.config import config_to_dict

    options.write_text(yaml.safe_dump(config_to_dict(config(run, root))))


def _embedding(case: Case) -> str:
    """A file of embeddings is whole or not there, and the same command makes it."""
    import numpy as np

    from gcahng.cli import main

    out = case.folder / "e.npy"
    words = ["embed", str(case.world / "run"), "--out", str(out), "--data.workers", "0", "--batch_size", "2"]
    name = case.chance.choice(sorted(_SIGNALS))
    _check(case, name, _send(case, lambda: main(words), name))
    right = np.load(case.world / "right.npy")
    if out.exists() and not np.allclose(np.load(out), right, rtol=1e-5, atol=1e-6):  # batches of another size round
        raise Fault("half-written", "the file is there and is not whole")
    if case.command(*words).status:
        raise Fault("wrong", "the same command is refused")
    if not np.allclose(np.load(out), right, rtol=1e-5, atol=1e-6):
        raise Fault("wrong", "the same command gave other embeddings")
    return FINE


def _indexing(case: Case) -> str:
    """An index is the old one or the new one."""
    from gcahng.cli import main

    index = case.copy("vectors") / "flat.index"
    before = index.read_bytes()
    words = ["index", "add", str(index), str(case.world / "vectors" / "q.safetensors"), "--allow_duplicates"]
    name = case.chance.choice(sorted(_SIGNALS))
    _check(case, name, _send(case, lambda: main(words), name))
    if index.read_bytes() != before and case.command("index", "info", index).status:
        raise Fault("half-written", "the index is neither the old one nor the new one")
    ran = case.command(*words)
    if ran.status:
        raise Fault("wrong", f"the same command is refused: {ran.err.strip()[-300:]}")
    return FINE
