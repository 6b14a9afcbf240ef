"""The processes that train one run together, as torchrun starts them, or a single process."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gcahng.engine.ranks import Ranks
from gcahng.errors import UserError

_Result = TypeVar("_Result")
# The others wait while the first one searches a large test set. torchrun notices a process that dies.
_PATIENCE = timedelta(days=7)
_started = itertools.count()


class OtherProcessFailed(UserError):
    """Another process of the run failed and reports its error; this process only ends."""


class Processes:
    """What the processes of a run tell each other. All processes call the same methods in the same order.

    Small values and the contents of files go over gloo, for which no device waits; gradients and embeddings go over
    `ranks`.

    Args:
        ranks: the processes as the loss sees them; None: this process is alone.
        local_rank: this process's place among those of its machine, and the number of its GPU.

    Attributes:
        rank: this process's place.
        count: the number of processes.
        first: whether this process writes, measures and prints.
    """

    def __init__(self, ranks: Ranks | None = None, local_rank: int = 0) -> None:
        self.ranks, self.local_rank = ranks, local_rank
        self.rank, self.count = (0, 1) if ranks is None else (ranks.rank, ranks.count)
        self.first = self.rank == 0
        self._control: Any = None if ranks is None else dist.new_group(backend="gloo", timeout=_PATIENCE)

    def part(self, length: int, multiple: int = 1) -> slice:
        """This process's share of a number of things.

        Args:
            length: how many things there are.
            multiple: shares are cut at multiples of it; the last shares may be smaller or empty.
        """
        blocks = -(-length // multiple)
        each = -(-blocks // self.count) * multiple
        return slice(min(self.rank * each, length), min((self.rank + 1) * each, length))

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self._control is None:
            return number
        most = torch.tensor(number)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._control)
        return int(most)

    def all_of(self, own: _Result) -> list[_Result]:
        """What each process has, by rank."""
        if self._control is None:
            return [own]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, own, group=self._control)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context in which every process does something on its own. None continues unless all succeed.

        Raises:
            OtherProcessFailed: in the processes that succeed, and in all but one of those that fail.
        """
        error = None
        try:
            yield
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        failed = self.count - self.largest(0 if error is None else self.count - self.rank)
        if error is not None and failed == self.rank:
            raise error
        if failed < self.count:
            raise OtherProcessFailed(f"process {failed} of {self.count} failed and says why") from error

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """A context in which the first process of a machine goes before the others, so that an index or a download is
        there for them."""
        if self.local_rank:
            self.largest(0)
        try:
            yield
        finally:
            if not self.local_rank:
                self.largest(0)

    def on_first(self, action: Callable[[], _Result]) -> _Result:
        """Let the first process do something while the others wait.

        Args:
            action: called in the first process.

        Returns:
            What the action returned, in all processes.

        Raises:
            OtherProcessFailed: in the others, where the action failed.
        """
        if self._control is None:
            return action()
        results: list[Any] = [None]
        with self.together():
            if self.first:
                results = [action()]
        dist.broadcast_object_list(results, dist.get_global_rank(self._control, 0), group=self._control)
        return results[0]

    def rows_on_first(self, rows: Tensor) -> Tensor:
        """(…, D) the rows of all processes by rank, on the first one's device; in the others their own rows."""
        if self._control is None:
            return rows
        parts: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(rows.cpu(), parts, dist.get_global_rank(self._control, 0), group=self._control)
        return rows if parts is None else torch.cat(parts).to(rows.device)

    def each(self, value: Tensor) -> Tensor:
        """(count,) the 0-dim values of all processes, on the device of this one's."""
        return value[None] if self.ranks is None else self.ranks.gather(value[None])

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replace each gradient by its mean over the processes, in place."""
        if self.ranks is None or not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.ranks.add_up(flat)
        parts = flat.div_(self.count).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


ALONE = Processes()


@contextmanager
def run_processes() -> Iterator[Processes]:
    """The processes that torchrun started for this run, or those of a torch.distributed group that exists already;
    without either, this process alone.

    On CUDA each process takes the GPU of its local rank. Where LOCAL_RANK is not set, because a script started its
    processes itself, it takes the current GPU.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    started = dist.is_available() and not dist.is_initialized() and dist.is_torchelastic_launched()
    if not started and not (dist.is_available() and dist.is_initialized()):
        yield ALONE
        return
    cuda = torch.cuda.is_available() and local_rank < torch.cuda.device_count()
    if cuda and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(local_rank)
    if started:
        # A prefix of its own in torchrun's store, because a script may train several runs.
        store, rank, count = next(iter(dist.rendezvous("env://")))
        store = dist.PrefixStore(f"gcahng run {next(_started)}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        yield ALONE if dist.get_world_size() == 1 else Processes(Ranks(dist.group.WORLD), local_rank)
    finally:
        if started:
            dist.destroy_process_group()


def says_nothing() -> bool:
    """Whether another process of the run prints what all of them would print."""
    return int(os.environ.get("RANK", 0)) > 0 and dist.is_available() and dist.is_torchelastic_launched()
