"""Shares the pairs of a batch between several processes.

Each process takes its part of the schedule (see make_schedule), and holds the edges of that part alone. An all-reduce
completes every sum over edges. Node tensors are then the same in every process, and each process computes all of them.
"""

from __future__ import annotations

import atexit
import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gcahng.engine.peers import Peer, difference, lost, says_lost, this_process
from gcahng.errors import UserError

SMALL = 2**16  # elements; larger tensors are sent by themselves, so that none of them is copied
_SECONDS_TO_FINISH = 0.05
_numbers = itertools.count(1)
_known: WeakValueDictionary[int, Ranks] = WeakValueDictionary()


class Ranks:
    """The processes of a torch.distributed group.

    Attributes:
        number: by which an operator, whose arguments are plain values, refers to them.
        group: the group.
        rank: this process's place among them.
        count: how many they are.
        peers: the processes by rank; empty before they have met.
    """

    def __init__(self, group: Any) -> None:
        self.number, self.group = next(_numbers), group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self._agreed: dict[Hashable, int] = {}
        self._stream: torch.cuda.Stream | None = None
        self._parts_are_known = False
        self.peers: list[Peer] = []
        _known[self.number] = self
        _let_threads_finish_at_exit()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        raise UserError("a loss with a process_group cannot be pickled; save its state_dict()")

    @contextmanager
    def calling(self) -> Iterator[None]:
        """A context for collectives, in which the loss of another process is told as such.

        Raises:
            LostProcess: a process has ended, is stopped, or does not answer within the group's timeout.
        """
        try:
            yield
        except RuntimeError as error:
            if (said := says_lost(error)) is None:
                raise
            raise lost([peer for peer in self.peers if peer.rank != self.rank], said) from None

    def meet(self, facts: Mapping[str, object]) -> None:
        """Sees that all processes have the same options, and learns who they are.

        Args:
            facts: what must be the same in all processes, by name.

        Raises:
            UserError: something differs. All processes raise it.
        """
        if dist.get_backend(self.group) == "fake":  # of tests, with one process that stands for several
            return
        found: list[Any] = [None] * self.count
        with self.calling():
            dist.all_gather_object(found, (this_process(self.rank, self.count), dict(facts)), group=self.group)
        self.peers = [Peer(*peer) for peer, _ in found]
        if text := difference(self.peers, [others for _, others in found]):
            raise UserError(text)

    def add_up(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over all processes."""
        self.start_adding(*tensors).finish()

    def start_adding(self, *tensors: Tensor) -> Adding:
        """Starts what `add_up` does. Tensors must be left alone until it is finished."""
        return Adding(self, tensors)

    def take_largest(self, tensor: Tensor) -> None:
        """Replaces each element of a tensor by the largest one of all processes."""
        with self.calling():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)

    def agree(self, question: Hashable, answer: Callable[[], int], device: torch.device) -> int:
        """Has all processes agree on a number: the largest of their answers. Each question is asked once.

        Args:
            question: what is asked; all processes ask the same questions in the same order.
            answer: this process's answer.
            device: a device that the group can communicate on.
        """
        if question not in self._agreed:
            largest = torch.tensor(answer(), device=device)
            self.take_largest(largest)
            self._agreed[question] = int(largest)
        return self._agreed[question]

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each process's tensors by those of the first process."""
        for message in _messages(tensors):
            with self.calling():
                dist.broadcast(message.sent, dist.get_global_rank(self.group, 0), group=self.group)
            message.hand_back()

    def join(self, module: nn.Module, seed: int) -> int:
        """Gives every process the parameters, buffers and seed of the first one.

        Args:
            module: whose tensors are replaced.
            seed: this process's seed.

        Returns:
            The first process's seed.
        """
        tensors = [t.detach() for t in (*module.parameters(), *module.buffers())]
        shared_seed = torch.tensor(seed, device=tensors[0].device)
        self.copy_from_first([*tensors, shared_seed])
        return int(shared_seed)

    def whole_batch(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Gathers a batch of which each process holds a part.

        Args:
            embeddings: this process's part (n / count, D).
            labels: its labels (n / count,).

        Returns:
            Embeddings (n, D) and labels (n,): the processes' parts, one after the other.

        Raises:
            UserError: the parts differ in size, or the first ones are all the same. All processes raise it.
        """
        sizes = self.numbers(torch.tensor([len(labels)], device=labels.device))
        if len(set(sizes)) > 1:
            raise UserError(
                f"embeddings has {len(labels)} rows here, and those of the process group's processes have "
                f"{', '.join(map(str, sizes))}; the parts of a batch must be as large as each other"
            )
        whole = _Gather.apply(embeddings, self), self.gather(labels)
        if not self._parts_are_known and self.count > 1:
            if all(_same_parts(tensor.detach(), self.count) for tensor in whole):
                raise UserError(
                    "embeddings has the same rows in every process; with a process_group each process must pass its "
                    "own part of the batch (does a wrapper gather it already, or has the sampler no part for each?)"
                )
            self._parts_are_known = True
        return whole

    def numbers(self, own: Tensor, ready: torch.cuda.Event | None = None) -> list[int]:
        """Reads a whole number of each process on the host, without waiting for what a GPU has been given to do since.

        Args:
            own: this process's number (1,), int64.
            ready: on a GPU the event after which it is there; None if it is there already.
        """
        if not own.is_cuda:
            return self.gather(own).tolist()
        if self._stream is None:
            self._stream = torch.cuda.Stream(own.device)
        # On the current stream the host would have to wait until the network has computed the embeddings.
        with torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            return self.gather(own).tolist()

    def gather(self, part: Tensor) -> Tensor:
        """Concatenates the processes' parts of a tensor along its first dimension."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.count)]
        with self.calling():
            dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts)


@cache
def _let_threads_finish_at_exit() -> None:
    """Have the interpreter wait for gloo's threads before it ends.

    A thread of gloo frees the tensors of the last collective, for which it needs the GIL, after the main thread has the
    result. Python ends a thread that asks for the GIL when the interpreter is finalizing, and C++ then aborts the whole
    process ("terminate called without an active exception"). Functions of atexit run before that, and sleeping releases
    the GIL.
    """
    atexit.register(time.sleep, _SECONDS_TO_FINISH)


def _same_parts(whole: Tensor, count: int) -> bool:
    """Whether all processes have passed the same rows, in whatever order."""
    parts = whole.view(count, len(whole) // count, -1).sort(dim=1).values
    return bool((parts == parts[:1]).all())


class _Message(NamedTuple):
    """What is sent for some tensors.

    Attributes:
        sent: a large tensor itself, or small ones as one tensor (W,).
        parts: those small tensors, to which the result is copied back.
    """

    sent: Tensor
    parts: list[Tensor]

    def hand_back(self) -> None:
        """Copies what the message has become back into the small tensors."""
        if self.parts:
            found = self.sent.split([tensor.numel() for tensor in self.parts])
            for tensor, part in zip(self.parts, found, strict=True):
                tensor.copy_(part.view_as(tensor))


def _messages(tensors: Iterable[Tensor]) -> Iterator[_Message]:
    """What is sent for these tensors: each large one, then for each dtype all small ones as one tensor.

    A message costs time however short it is.
    """
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() > SMALL:
            yield _Message(tensor, [])
        else:
            small.setdefault(tensor.dtype, []).append(tensor)
    for same in small.values():
        yield _Message(torch.cat([tensor.reshape(-1) for tensor in same]), same)


class Adding:
    """Sums over all processes that are on their way while a process goes on computing.

    They have the same bits as if the process waited for them: the collectives are the same, in the same order.

    Args:
        ranks: the processes.
        tensors: what is replaced by its sum.
    """

    def __init__(self, ranks: Ranks, tensors: Iterable[Tensor]) -> None:
        self._ranks, self._messages = ranks, list(_messages(tensors))
        with ranks.calling():
            self._works = [
                dist.all_reduce(message.sent, group=ranks.group, async_op=True) for message in self._messages
            ]

    def finish(self) -> None:
        """Waits for the sums.

        Raises:
            LostProcess: as in Ranks.calling.
        """
        for work, message in zip(self._works, self._messages, strict=True):
            with self._ranks.calling():
                work.wait()
            message.hand_back()


class _Gather(torch.autograd.Function):
    """Gathers the processes' parts of a tensor, with a gradient.

    The gradient is the process's own part of the upstream gradient, times the number of processes: every process
    differentiates the whole batch's loss, and DistributedDataParallel takes the mean over processes.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.rows = ranks, part.shape[0]
        return ranks.gather(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        start = ctx.ranks.rank * ctx.rows
        return gradient[start : start + ctx.rows] * ctx.ranks.count, None


def ranks_of(number: int) -> Ranks | None:
    """The processes of this number; None for 0, which stands for a process that works alone."""
    return _known[number] if number else None


def ranks_for(process_group: Any) -> Ranks | None:
    """Finds the processes that the loss's `process_group` means.

    Args:
        process_group: None, "alone", "world" or a torch.distributed group.

    Returns:
        The processes, or None for None and "alone".

    Raises:
        UserError: torch.distributed is not initialized, process_group is none of these, or the group does not hold this
            process.
    """
    if process_group is None or process_group == "alone":
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError(
            f"process_group is {process_group!r} and torch.distributed is not initialized; call "
            "torch.distributed.init_process_group first"
        )
    if process_group == "world":
        process_group = dist.group.WORLD
    if not isinstance(process_group, dist.ProcessGroup):
        raise UserError(
            f"process_group is {process_group!r}; it must be None, 'alone', 'world' or a torch.distributed group"
        )
    if dist.get_rank(process_group) < 0:
        raise UserError("process_group is a group without this process; it must be one that holds it")
    return Ranks(process_group)
