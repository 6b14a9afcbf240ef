"""Worker processes that read ahead, however Python starts them: fork, forkserver (since Python 3.14) or spawn."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

from gcahng.errors import UserError
from gcahng.machine import usable_cpus

# The status of a process that was started as a worker, and found itself doing the work of the script instead.
_NO_MAIN_GUARD = 86

_Job = TypeVar("_Job", contravariant=True)
_Result = TypeVar("_Result", covariant=True)


class Reader(Protocol[_Job, _Result]):
    """Does one job in a worker process. A file that cannot be read is returned as an error, not raised."""

    def __getitem__(self, job: _Job) -> _Result | UserError: ...


def usual_workers(workers: int | None) -> int:
    """The number of worker processes to use.

    Args:
        workers: returned as it is, unless it is None. Then the result is one less than this process's processors, at
            most 8. Processes that torchrun started on this machine share them.
    """
    if workers is not None:
        return workers
    return max(0, min(8, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def leave_if_starting() -> None:
    """End this process if it is about to become a worker, and only runs the user's script to know its functions.

    Called by whatever takes long or writes files. The process that starts the worker then says what is missing.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(_NO_MAIN_GUARD)  # what is raised here would be printed by each of the processes


def read_in_order(
    reader: Reader[_Job, _Result], jobs: Iterable[_Job], workers: int, pin_memory: bool = False
) -> Iterator[_Result]:
    """Yield the results of `jobs` in order, while `workers` processes read ahead.

    Closing the iterator stops the processes.

    Args:
        reader: does a job. Processes that are not forked get it pickled; tensors in it are shared, not copied.
        jobs: the jobs; they may be endless.
        workers: number of processes; 0 does the jobs in this process.
        pin_memory: put the results into pinned memory.

    Raises:
        UserError: a reader returned one, a worker was killed or cannot be started, or the script has no main guard.
    """
    leave_if_starting()
    loader = DataLoader(
        reader,  # type: ignore[arg-type]  # a mapping from jobs to results, as a DataLoader with a sampler expects
        batch_size=None,
        sampler=jobs,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        # Without a generator of its own, a loader draws from torch's global one, and a resumed run would differ.
        generator=torch.Generator().manual_seed(0),
    )
    results: Any = None
    try:
        while True:
            try:
                if results is None:
                    with _interrupts_held(workers > 0):
                        results = iter(loader)
                result = next(results)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError) as error:
                if (explained := _explained(error, workers, results)) is None:
                    raise
                raise explained from None
            if isinstance(result, UserError):
                raise result
            yield result
    finally:
        del results  # its destructor stops the workers


def _explained(error: Exception, workers: int, results: Any) -> UserError | None:
    """What the end of a worker means; None if the error is something else."""
    if not workers:
        return None
    method = multiprocessing.get_start_method()
    codes = [process.exitcode for process in getattr(results, "_workers", ())]
    # forkserver imports the script in a server, too, which has gone when a worker is asked of it.
    cannot_start = isinstance(error, EOFError | ConnectionError) or _NO_MAIN_GUARD in codes
    if cannot_start and method != "fork":
        script = getattr(sys.modules.get("__main__"), "__file__", None) or "the script"
        return UserError(
            f"data.workers is {workers}, and the processes that read images cannot start: Python starts them by "
            f"{method}, for which each imports {script}, and that does its work again; put what it does under "
            'if __name__ == "__main__":, or set data.workers to 0'
        )
    if isinstance(error, OSError) and results is None:  # too little memory, too many processes or open files
        return UserError(
            f"data.workers is {workers}, and so many processes that read images cannot be started: {error.strerror}"
        )
    if isinstance(error, RuntimeError) and ("DataLoader worker (pid" in str(error) or "shared memory" in str(error)):
        return UserError(
            f"data.workers is {workers} and a process that reads images was killed, perhaps because memory or "
            "shared memory ran out (in a container, --shm-size sets the latter); with fewer workers, less of "
            "both is needed"
        )
    return None


@contextmanager
def _interrupts_held(held: bool) -> Iterator[None]:
    """Let a Ctrl-C wait while workers are started, and start them so that it does not end them before they can
    leave it to the parent."""
    if not held or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore Ctrl-C and leave the process group: the parent still needs its last batch when it is interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
