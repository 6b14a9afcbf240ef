"""The processes that work on one thing together, as torchrun starts them, or a single process."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gcahng.devices import local_device_index, resolve_device
from gcahng.engine.peers import Peer, difference, says_lost, this_process
from gcahng.engine.ranks import Ranks
from gcahng.errors import UserError
from gcahng.installed import source_digest
from gcahng.launch import Launch, launched
from gcahng.processes.meeting import meet
from gcahng.processes.telling import OtherProcessFailed, of_all, telling
from gcahng.processes.watch import Watch

_Result = TypeVar("_Result")
TIMEOUT = 600.0  # seconds, before the processes have agreed on another
# What one process does for all may take long, such as the search of a large test set. The watch sees that it lives.
_PATIENCE = timedelta(days=7)
_started = itertools.count()
_current: list[Processes] = []


class Processes:
    """What the processes of a run tell each other. All processes call the same methods in the same order.

    Small values and the contents of files go over gloo, for which no device waits; gradients and embeddings go over
    `ranks`.

    Args:
        ranks: the processes as the loss sees them; None: this process is alone.
        local_rank: this process's place among those of its machine, and the number of its GPU.
        watch: that looks after the others; None: none does.

    Attributes:
        rank: this process's place.
        count: the number of processes.
        first: whether this process writes, measures and prints.
    """

    def __init__(self, ranks: Ranks | None = None, local_rank: int = 0, watch: Watch | None = None) -> None:
        self.ranks, self.local_rank, self._watch = ranks, local_rank, watch
        self.rank, self.count = (0, 1) if ranks is None else (ranks.rank, ranks.count)
        self.first = self.rank == 0
        self._control: Any = None
        self._patient: Any = None
        self._made: list[Any] = []
        if ranks is not None:
            self._control = self._patient = self._new_group(backend="gloo", timeout=_PATIENCE)

    def _new_group(self, **options: Any) -> Any:
        self._made.append(dist.new_group(**options))
        return self._made[-1]

    def close(self) -> None:
        """Give back the groups that were made for these processes, once no collective is under way."""
        while self._made:
            dist.destroy_process_group(self._made.pop())

    def set_timeout(self, seconds: float) -> None:
        """Bound how long a process waits for the others where none of them does something for all.

        Args:
            seconds: the same in all processes.
        """
        if self.ranks is None:
            return
        peers, limit = self.ranks.peers, timedelta(seconds=seconds)
        self._control = self._new_group(backend="gloo", timeout=limit)
        self.ranks = Ranks(self._new_group(timeout=limit))
        self.ranks.peers = peers
        if self._watch is not None:
            self._watch.timeout = seconds

    def set_way_back(self, way_back: Callable[[], str]) -> None:
        """Say how the run can be continued, for the message that another process was lost."""
        if self._watch is not None:
            self._watch.way_back = way_back

    def __str__(self) -> str:
        """This process, as messages name it."""
        return f"process {self.rank} of {self.count} on {platform.node()}"

    def same(self, facts: Mapping[str, object]) -> None:
        """See that something is the same in all processes.

        Args:
            facts: by name, plain values.

        Raises:
            UserError: something differs; the first process raises it.
            OtherProcessFailed: the same, in the others.
        """
        if self.ranks is None:
            return
        found = self.all_of(dict(facts))
        peers = self.ranks.peers or self._introduced()
        if text := difference(peers, found):
            raise of_all(UserError(text)) if self.first else OtherProcessFailed(text)

    def _introduced(self) -> list[Peer]:
        """The processes by rank, where they have not met before."""
        assert self.ranks is not None
        self.ranks.peers = [Peer(*peer) for peer in self.all_of(this_process(self.rank, self.count))]
        return self.ranks.peers

    def device(self, name: str) -> torch.device:
        """The device that `name` means; each of several processes has the GPU of its local rank (see `run_processes`).

        Raises:
            UserError: there is no such device.
        """
        if self.count > 1 and name.startswith("cuda:"):
            raise UserError(f"device is {name!r}; each of {self.count} processes takes a GPU of its own: give cuda")
        device, devices = resolve_device(name), torch.cuda.device_count()
        if device.type == "cuda" and self.count > 1 and devices > 1 and self.local_rank >= devices:
            raise UserError(
                f"device is {name!r}; PyTorch finds {devices} CUDA devices here, and there are more processes: start "
                "as many as there are devices, or give cpu"
            )
        return device

    def check_devices(self, device: torch.device) -> None:
        """See that all processes compute on one kind of device, and that each has a GPU of its own.

        Raises:
            UserError: they do not.
        """
        self.same({"device": device.type})
        if device.type != "cuda" or self.count == 1:
            return
        own = (platform.node(), str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
        owners = self.all_of(own)
        with self.together():
            if (other := owners.index(own)) != self.rank:
                raise UserError(
                    f"processes {other} and {self.rank} have the same GPU, {own[1]}; start as many processes on a "
                    "machine as it has GPUs"
                )

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
        return self._largest([number], self._control)[0]

    def _largest(self, numbers: list[int], group: Any) -> list[int]:
        """The largest of all processes' numbers, place by place."""
        if self.ranks is None:
            return numbers
        most = torch.tensor(numbers)
        with self.ranks.calling():
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        return most.tolist()

    def all_of(self, own: _Result) -> list[_Result]:
        """What each process has, by rank."""
        if self.ranks is None:
            return [own]
        values: list[Any] = [None] * self.count
        with self.ranks.calling():
            dist.all_gather_object(values, own, group=self._control)
        return values

    @contextmanager
    def together(self, patient: bool = False) -> Iterator[None]:
        """A context in which every process does something on its own. None continues unless all succeed.

        Args:
            patient: whether that may take longer than the timeout in some of them.

        Raises:
            OtherProcessFailed: in the processes that succeed, and in all but one of those that fail.
        """
        error = None
        try:
            yield
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        bad = error is not None
        group = self._patient if patient else self._control
        lowest, any_succeeded = self._largest([self.count - self.rank if bad else 0, 0 if bad else 1], group)
        failed = self.count - lowest
        if error is not None and failed == self.rank:
            if any_succeeded:
                error.where = str(self)  # type: ignore[attr-defined]
            raise of_all(error)
        if failed < self.count:
            raise OtherProcessFailed(f"process {failed} of {self.count} failed and says why") from error

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """A context in which the first process of a machine goes before the others, so that an index or a download is
        there for them."""
        if self.local_rank:
            self._largest([0], self._patient)
        try:
            yield
        finally:
            if not self.local_rank:
                self._largest([0], self._patient)

    def on_first(self, action: Callable[[], _Result]) -> _Result:
        """Let the first process do something while the others wait.

        Args:
            action: called in the first process.

        Returns:
            What the action returned, in all processes.

        Raises:
            OtherProcessFailed: in the others, where the action failed.
        """
        if self.ranks is None:
            return action()
        results: list[Any] = [None]
        with self.together(patient=True):
            if self.first:
                results = [action()]
        with self.ranks.calling():
            dist.broadcast_object_list(results, dist.get_global_rank(self._control, 0), group=self._control)
        return results[0]

    def rows_on_first(self, rows: Tensor) -> Tensor:
        """(…, D) the rows of all processes by rank, on the first one's device; in the others their own rows."""
        if self.ranks is None:
            return rows
        parts: list[Any] | None = [None] * self.count if self.first else None
        with self.ranks.calling():
            dist.gather_object(rows.cpu(), parts, dist.get_global_rank(self._control, 0), group=self._control)
        return rows if parts is None else torch.cat([part for part in parts if len(part)] or parts).to(rows.device)

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
def alone() -> Iterator[None]:
    """A context in which what this process does is its own, although others were started with it.

    In a script in which only one process evaluates or embeds, it would wait for the others otherwise. It is not for
    training.
    """
    _current.append(ALONE)
    try:
        yield
    finally:
        _current.pop()


@contextmanager
def run_processes(timeout: float = TIMEOUT) -> Iterator[Processes]:
    """The processes that torchrun started for this run, or those of a torch.distributed group that exists already;
    without either, this process alone. Within another such context, the same processes.

    On CUDA each process takes the GPU of its local rank, or the only one that it sees. Where LOCAL_RANK is not set,
    because a script started its processes itself, it takes the current GPU.

    Args:
        timeout: seconds for all to come, and to answer later. Within another such context only the latter.

    Raises:
        UserError: not all processes have come, or they differ in code; several were started that torch.distributed does
            not know of.
        OtherProcessFailed: another process says why all end.
    """
    if _current:
        if timeout != TIMEOUT:
            _current[-1].set_timeout(timeout)
        yield _current[-1]
        return
    there = dist.is_available() and dist.is_initialized()
    local_rank = os.environ.get("LOCAL_RANK", "")
    launch = Launch(local_rank=int(local_rank) if local_rank.isdigit() else 0) if there else launched()
    if not there and launch.count == 1 or there and dist.get_world_size() == 1:
        _take_device()
        yield ALONE
        return
    with ExitStack() as stack:
        processes, watch = _joined(stack, there, launch, timeout)
        _current.append(processes)
        stack.callback(_current.pop)
        with telling(processes, watch):
            yield processes
        if there:  # otherwise they end with the group of all; after an error others may still be in a collective
            processes.close()


def _joined(stack: ExitStack, there: bool, launch: Launch, timeout: float) -> tuple[Processes, Watch]:
    """Meet the other processes, and leave them when the stack ends."""
    cuda = _take_device()
    # Of its own, because a script may train several runs, and torchrun may start all again with the same store.
    name = f"gcahng run {next(_started)} of attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    facts = {
        "the version of torch": torch.__version__,
        "the digest of gcahng's code": source_digest(),
        "the kind of device": "cuda" if cuda else "cpu",
    }
    if there:
        store, rank, count = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    else:
        try:
            store, rank, count = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
        except RuntimeError as error:
            raise UserError(
                f"process {launch.rank} of {launch.count} cannot reach the others ({says_lost(error) or error}); "
                "MASTER_ADDR and MASTER_PORT must be where process 0 or torchrun listens"
            ) from error
    meeting = dist.PrefixStore(f"{name} meeting", store)
    Watch.prepare(meeting, rank)
    try:
        peers = meet(meeting, rank, count, facts, timeout)
    except UserError as error:
        raise (error if rank == 0 else OtherProcessFailed(error.text)) from None
    watch = stack.enter_context(Watch(meeting, peers, rank, timeout))
    with telling(peers[rank], watch):
        if not there:
            # cuDNN and NCCL may use the GPU of the group from now on.
            backend, groups = "cpu:gloo,cuda:nccl" if cuda else "gloo", dist.PrefixStore(name, store)
            limit = timedelta(seconds=timeout)
            dist.init_process_group(backend, store=groups, rank=rank, world_size=count, timeout=limit)
            stack.callback(dist.destroy_process_group)
        ranks = Ranks(dist.group.WORLD)
        ranks.peers = peers
        return Processes(ranks, launch.local_rank, watch), watch


def _take_device() -> bool:
    """Take the GPU of this process, and return whether it has one."""
    index = local_device_index()
    if index is not None:
        torch.cuda.set_device(index)
    return torch.cuda.is_available() and torch.cuda.device_count() > 0
