"""Stand-ins that keep a case small: no endless training, and no army of processes."""

from __future__ import annotations

from typing import Any

from hostile.case import Fault

MOST_STEPS = 8
MOST_WORKERS = 16


class Enough(BaseException):
    """A training run has begun and goes on well; nobody waits for its end."""


def stop_after_steps(most: int = MOST_STEPS) -> None:
    """In this process, training ends with `Enough` after so many steps."""
    from gcahng.train.trainer import Trainer

    real, steps = Trainer.train_step, [0]

    def step(self: Any) -> Any:
        steps[0] += 1
        if steps[0] > most:
            raise Enough
        return real(self)

    Trainer.train_step = step  # type: ignore[method-assign]


def no_armies() -> None:
    """In this process, starting very many workers is a fault rather than a dead machine."""
    from torch.utils.data import DataLoader

    real = DataLoader.__init__

    def start(self: Any, *arguments: Any, **options: Any) -> None:
        if options.get("num_workers", 0) > MOST_WORKERS:
            raise Fault("memory", f"{options['num_workers']} worker processes were about to start")
        real(self, *arguments, **options)

    DataLoader.__init__ = start  # type: ignore[method-assign]
