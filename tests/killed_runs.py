"""Runs that are killed again and again, beside one that is not; prints what differs as JSON. Run by test_killed.py.

    python killed_runs.py FOLDER KILLS SEED

Children are forked from this process, which has imported everything and computes nothing itself. A kill is SIGKILL, at
a random time or in the middle of a random write, fsync or rename of a file of the run. Each killed run is resumed, and
that may be killed too. At the end of each stands the comparison.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small_runs import few_glyphs, first_classes

from gcahng import files
from gcahng.data import DataSplits
from gcahng.runs.checkpoint import load_checkpoint
from gcahng.train import BackboneConfig, DataConfig, GcaConfig, TrainConfig, fit, loop, resume, session

KILLS_A_RUN = 3
Event = tuple[str, int]  # write, fsync or rename, and which of them


def small_data() -> DataSplits:
    """12 training, 6 validation and 6 test classes."""
    data = few_glyphs()
    return replace(data, test=first_classes(data.test, 6))


def config(out: Path) -> TrainConfig:
    return TrainConfig(
        steps=9,
        steps_per_epoch=4,
        eval_every=3,
        log_every=2,
        keep_every=4,
        device="cpu",
        threads=1,
        out=str(out),
        data=DataConfig(classes_per_batch=4, train_classes=12, val_classes=6),
        backbone=BackboneConfig(embedding_dim=16, width=4),
        gca=GcaConfig(heads=2),
    )


class FileStandIn:
    """Does with a file what the file does; another class may write otherwise."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> FileStandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def kill_at(kind: str, number: int) -> Counter[str]:
    """This process kills itself in the middle of its `number`-th write, fsync or rename; returns the counts of them."""
    count: Counter[str] = Counter()

    def event(name: str, half: Callable[[], Any]) -> None:
        count[name] += 1
        if name == kind and count[name] == number:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    real_open, fsync, rename = open, os.fsync, os.replace

    class File(FileStandIn):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(real_open(*arguments, **options))

        def write(self, data: bytes) -> int:
            event("write", lambda: (self._file.write(data[: len(data) // 2]), self._file.flush()))
            return self._file.write(data)

    files.open = File  # type: ignore[attr-defined]
    os.fsync = lambda fd: (event("fsync", lambda: None), fsync(fd))[1]  # type: ignore[assignment]
    os.replace = lambda a, b: (event("rename", lambda: None), rename(a, b))[1]  # type: ignore[assignment]
    return count


def child(
    action: Callable[[], Any], counts: Path, after: float | None = None, event: tuple[str, int] = ("", 0)
) -> bool:
    """Run `action` in a fork that is killed `after` seconds or at an `event`; whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            count = kill_at(*event)
            action()
            counts.write_text(json.dumps(count))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    end = None if after is None else time.monotonic() + after
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                raise SystemExit("a child failed")
            return os.WIFEXITED(status)
        if end is not None and time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            end = None
        time.sleep(0.002)


def no_pictures(run: Path, *_: object) -> None:
    """Replaces the plots, which take longer than all the rest and come last before the summary."""
    files.write_text(run / "curves.png", "")


def start_or_resume(run: Path) -> dict[str, Any]:
    """Do what a user does: resume a run, or start again where there is nothing to resume."""
    if (run / "config.yaml").exists():
        return resume(run)
    if run.exists():
        for path in run.iterdir():
            path.unlink()
    return fit(config(run))


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths of nested values that are not the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return [path]
        return [found for key in a for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [path]
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def outcome(run: Path) -> dict[str, Any]:
    """Everything that a run leaves, except times, paths and how often it was resumed."""
    found: dict[str, Any] = {}
    for path in sorted((run / "checkpoints").glob("*.pt")):
        state = load_checkpoint(path)
        state["config"].pop("out")
        for name in ("seconds", "resumed"):
            state.pop(name)
        if path.stem != "previous":  # there may be one save more, at the signal
            found[path.name] = state
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [line for line in lines if line["kind"] != "system"]
    summary = json.loads((run / "summary.json").read_text())
    found["summary"] = {name: summary[name] for name in ("test", "test_best", "val", "best", "steps", "left_out")}
    found["files"] = sorted(str(path.relative_to(run)) for path in run.rglob("*") if "tfevents" not in path.name)
    return found


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    data = small_data()
    loop.load_data = lambda _: data  # type: ignore[assignment]
    session.draw_pictures = no_pictures
    chance = random.Random(seed)
    whole, count = folder / "whole", folder / "count"
    start = time.monotonic()
    child(lambda: fit(config(whole)), count)
    seconds, events = time.monotonic() - start, json.loads(count.read_text())
    expected = outcome(whole)
    done = runs = 0
    found = []
    while done < kills:
        run = folder / f"killed-{runs}"
        runs += 1
        for _ in range(min(KILLS_A_RUN, kills - done)):
            kind = chance.choice(["time", *sorted(events)])
            after = chance.uniform(0, seconds) if kind == "time" else None
            event = ("", 0) if kind == "time" else (kind, chance.randint(1, events[kind]))
            if child(lambda run=run: start_or_resume(run), count, after, event):
                break  # it had less left to do
            done += 1
        child(lambda run=run: start_or_resume(run), count)
        found += [f"{run.name}{difference}" for difference in differences(expected, outcome(run))]
    print(json.dumps({"kills": done, "runs": runs, "events": events, "differences": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
