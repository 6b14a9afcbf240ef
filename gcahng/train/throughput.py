"""How many images a second a run trains, how long it waits for data, and how much memory it takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gcahng.train.trainer import Trainer

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class StepTimer:
    """Times training steps, without set-up, evaluation and checkpoints.

    Args:
        trainer: makes the steps.
        seconds: of earlier sessions of the run.
        cpu_seconds: of earlier sessions of the run.

    Attributes:
        seconds: wall-clock time of the steps.
        cpu_seconds: CPU time of the steps, which other processes do not lengthen.
    """

    def __init__(self, trainer: Trainer, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self._trainer = trainer
        self.seconds, self.cpu_seconds = seconds, cpu_seconds
        self._start_interval()

    def train_step(self) -> dict[str, Tensor]:
        """Call and time trainer.train_step(); work that a GPU has not done yet is counted in a later step."""
        with self.timing():
            return self._trainer.train_step()

    @contextmanager
    def timing(self) -> Iterator[None]:
        """A context whose time is counted."""
        wall, cpu = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - wall
            self.cpu_seconds += time.process_time() - cpu

    def interval(self) -> dict[str, float]:
        """The figures of the steps since the last call.

        Returns:
            "images_per_second"; "data_wait", the share of the time that the steps waited for batches; "lr", the
            learning rate of the last step; "peak_memory_mib", see `peak_memory_mib`; and with fp16 "grad_scale".
        """
        steps = self._trainer.step - self._step
        seconds = max(self.seconds - self._seconds, 1e-9)
        batch = self._trainer.config.data.classes_per_batch * self._trainer.config.data.samples_per_class
        figures = {
            "images_per_second": steps * batch / seconds,
            "data_wait": min(1.0, (self._trainer.wait_seconds - self._wait) / seconds),
            "lr": self._trainer.optimizer.param_groups[0]["lr"],
        }
        if (memory := peak_memory_mib(self._trainer.device)) is not None:
            figures["peak_memory_mib"] = memory
        if self._trainer.scaler.is_enabled():
            figures["grad_scale"] = self._trainer.scaler.get_scale()
        self._start_interval()
        return figures

    def _start_interval(self) -> None:
        self._seconds, self._wait, self._step = self.seconds, self._trainer.wait_seconds, self._trainer.step


def peak_memory_mib(device: torch.device) -> float | None:
    """The most memory so far in MiB: what PyTorch allocated on a GPU, or what this process held; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
