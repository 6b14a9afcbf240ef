"""The processes that train one run together, as torchrun starts them, or this one alone."""

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
# The others wait while the first one searches a large test set; one that dies is torchrun's to notice.
_PATIENCE = timedelta(days=7)
_started = itertools.count()


class OtherProcessFailed(UserError):
    """Another process of the run met the error and tells it; this one only ends with it."""


class Processes:
    """What the processes of a run tell each other. Every method is one of all processes, called in the same order.

    Small things and files' contents go over gloo, which keeps no device waiting; gradients and embeddings over `ranks`.

    Args:
        ranks: of the devices' group; None: this process is alone.
        local_rank: this process's place among those of its machine; its GPU's number.

    Attributes:
        rank, count: this process's place, and how many there are.
        first: whether this one writes, measures and reports.
    """

    def __init__(self, ranks: Ranks | None = None, local_rank: int = 0) -> None:
        self.ranks, self.local_rank = ranks, local_rank
        self.rank, self.count = (0, 1) if ranks is None else (ranks.rank, ranks.count)
        self.first = self.rank == 0
        self._control: Any = None if ranks is None else dist.new_group(backend="gloo", timeout=_PATIENCE)

    def part(self, length: int, multiple: int = 1) -> slice:
        """This process's share of `length` things, cut at multiples of `multiple`; of the last there may be fewer, or
        none."""
        blocks = -(-length // multiple)
        each = -(-blocks // self.count) * multiple
        return slice(min(self.rank * each, length), min((self.rank + 1) * each, length))

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self._control is None:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._control)
        return int(found)

    def all_of(self, own: _Result) -> list[_Result]:
        """What each process has, in their order."""
        if self._control is None:
            return [own]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, own, group=self._control)
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all do, each on its own, and none goes on from unless all could.

        Raises:
            OtherProcessFailed: in those that could, and where several could not, in all of them but one.
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
        """What the first process of a machine does before its others, so that they find it done (an index, a
        download)."""
        if self.local_rank:
            self.largest(0)
        try:
            yield
        finally:
            if not self.local_rank:
                self.largest(0)

    def on_first(self, action: Callable[[], _Result]) -> _Result:
        """What the first process finds; the others wait for it.

        Raises:
            OtherProcessFailed: in the others, where the first one could not.
        """
        if self._control is None:
            return action()
        found: list[Any] = [None]
        with self.together():
            if self.first:
                found = [action()]
        dist.broadcast_object_list(found, dist.get_global_rank(self._control, 0), group=self._control)
        return found[0]

    def rows_on_first(self, rows: Tensor) -> Tensor:
        """Every process's rows (…, D), one after the other, on the first process's device; elsewhere its own."""
        if self._control is None:
            return rows
        found: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(rows.cpu(), found, dist.get_global_rank(self._control, 0), group=self._control)
        return rows if found is None else torch.cat(found).to(rows.device)

    def each(self, value: Tensor) -> Tensor:
        """Every process's 0-dim value (count,), on its device."""
        return value[None] if self.ranks is None else self.ranks.gather(value[None])

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Puts the mean over processes in each gradient's place."""
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
    """The processes that torchrun started for this run, or those of a torch.distributed group that is there already;
    without either this one is alone. On CUDA each takes the GPU of its local rank, or where LOCAL_RANK is not set (a
    script that started its processes itself) the one that is current."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    started = dist.is_available() and not dist.is_initialized() and dist.is_torchelastic_launched()
    if not started and not (dist.is_available() and dist.is_initialized()):
        yield ALONE
        return
    cuda = torch.cuda.is_available() and local_rank < torch.cuda.device_count()
    if cuda and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(local_rank)
    if started:
        # With names of its own in torchrun's store: a script may train one run after the other.
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
    """Whether what all processes of a run would say in the same way is left to another one."""
    return int(os.environ.get("RANK", 0)) > 0 and dist.is_available() and dist.is_torchelastic_launched()
