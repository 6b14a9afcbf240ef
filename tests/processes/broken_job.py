"""`gcahng train` on little data, in which a process is hurt at a point of choice; torchrun starts it in test_broken.py.

    broken_job.py POINT RANK HURT ARGUMENT ...

POINT is "collective", "batch", "checkpoint" or "never"; HURT is KILL, STOP, MEMORY or DISK. The run's checkpoints are
of steps 3 and 6. A process is hurt in step 5, or in the middle of writing the second checkpoint.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

from killed_runs import FileStandIn, no_pictures, small_data

from gcahng import files
from gcahng.cli import main
from gcahng.engine.ranks import Ranks
from gcahng.train import loop, session
from gcahng.train.trainer import Trainer

POINT, RANK, HURT, *ARGUMENTS = sys.argv[1:]
HERE = os.environ["RANK"] == RANK
OPTIONS = """--steps 9 --steps_per_epoch 4 --eval_every 3 --log_every 2 --device cpu --threads 1 --out run
--data.classes_per_batch 4 --data.samples_per_class 3 --data.train_classes 12 --data.val_classes 6
--backbone.embedding_dim 16 --backbone.width 4 --gca.heads 2"""
step = 0


def hurt() -> None:
    if HURT == "MEMORY":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")
    if HURT == "DISK":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getpid(), getattr(signal, f"SIG{HURT}"))


def step_is_noted(real: Any) -> Any:
    def train_step(self: Trainer) -> Any:
        global step
        step = self.step + 1
        return real(self)

    return train_step


def hurts(real: Any) -> Any:
    def call(*arguments: Any) -> Any:
        if HERE and step == 5:
            hurt()
        return real(*arguments)

    return call


class File(FileStandIn):
    """A file of which the first half is written."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(open(*arguments, **options))  # noqa: SIM115  # closed by its __exit__
        self._hurts = HERE and step == 6 and "last.pt" in str(arguments[0])

    def write(self, data: bytes) -> int:
        if self._hurts:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            hurt()
        return self._file.write(data)


if __name__ == "__main__":
    loop.load_data = lambda _: small_data()  # type: ignore[assignment]
    session.draw_pictures = no_pictures
    Trainer.train_step = step_is_noted(Trainer.train_step)  # type: ignore[method-assign]
    if POINT == "collective":
        Ranks.start_adding = hurts(Ranks.start_adding)  # type: ignore[method-assign]
    if POINT == "batch":
        Trainer._learn = hurts(Trainer._learn)  # type: ignore[method-assign]
    if POINT == "checkpoint":
        files.open = File  # type: ignore[attr-defined]
    own = [word for rank, _, word in (a.partition(":") for a in ARGUMENTS) if rank in ("all", os.environ["RANK"])]
    sys.exit(main(["train", *(OPTIONS.split() if "--resume" not in own else []), *own]))
