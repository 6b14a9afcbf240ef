"""Runs that a signal stops after a step of choice or that a full disk stops, and what they logged."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gcahng.train import TrainConfig, TrainingInterrupted, fit
from gcahng.train.trainer import Trainer


@contextlib.contextmanager
def signal_at(step: int, number: int = signal.SIGINT) -> Iterator[None]:
    """A signal comes during this step."""
    real = Trainer.train_step

    def step_then_signal(self: Trainer) -> Any:
        logs = real(self)
        if self.step == step:
            os.kill(os.getpid(), number)
        return logs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_then_signal)
        yield


def interrupted(config: TrainConfig, step: int) -> Path:
    """A run that was stopped after a step."""
    with signal_at(step), pytest.raises(TrainingInterrupted):
        fit(config)
    return Path(str(config.out))


def full_disk_after(real: Callable[..., Any], when: Callable[..., bool], number: int = errno.ENOSPC) -> Any:
    """`real`, except for calls that fail as on a full disk."""

    def failing(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    return failing


def lines_of(run: Path, kind: str) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == kind]
