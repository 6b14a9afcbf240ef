"""A batch whose pairs several processes share: what they add up, and how they come to hold one batch and one state.

Each process takes its part of the schedule (see make_schedule) and holds the edges of that part alone. Whatever is a
sum over edges is completed by an all-reduce; node tensors are then the same everywhere, and are computed by everyone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gcahng.errors import UserError

SMALL = 2**16  # numbers: larger tensors go by themselves, so that none of them is copied
_numbers = itertools.count(1)
_known: WeakValueDictionary[int, Ranks] = WeakValueDictionary()


class Ranks:
    """The processes of a torch.distributed group; number: what an operator knows them by; rank: this process's place
    among them; count: how many they are."""

    def __init__(self, group: Any) -> None:
        self.number, self.group = next(_numbers), group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self._agreed: dict[Hashable, int] = {}
        _known[self.number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        raise UserError("a loss with a process_group cannot be pickled; save its state_dict()")

    def add_up(self, *tensors: Tensor) -> None:
        """Puts the sum over all processes in each tensor's place."""
        for tensor in _few(tensors):
            dist.all_reduce(tensor, group=self.group)

    def agree(self, question: Hashable, answer: Callable[[], int], device: torch.device) -> int:
        """The largest of all processes' answers (small numbers) to a question, which is asked once."""
        if question not in self._agreed:
            found = torch.tensor(answer(), device=device)
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
            self._agreed[question] = int(found)
        return self._agreed[question]

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Puts the first process's tensors in the place of everyone's."""
        for tensor in _few(tensors):
            dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)

    def join(self, module: nn.Module, seed: int) -> int:
        """Gives everyone the first process's parameters and buffers → its seed."""
        tensors = [t.detach() for t in (*module.parameters(), *module.buffers())]
        found = torch.tensor(seed, device=tensors[0].device)
        self.copy_from_first([*tensors, found])
        return int(found)

    def whole_batch(self, embeddings: Tensor, labels: Tensor, check: bool) -> tuple[Tensor, Tensor]:
        """The processes' parts of a batch, (n / count, D) and (n / count,), one after the other. check: UserError if
        they are not as large as each other, at the cost of a synchronization."""
        if check:
            sizes = self.gather(torch.tensor([len(labels)], device=labels.device)).tolist()
            if len(set(sizes)) > 1:
                raise UserError(
                    f"embeddings has {len(labels)} rows here, and those of the process group's processes have "
                    f"{', '.join(map(str, sizes))}; the parts of a batch must be as large as each other"
                )
        return _Gather.apply(embeddings, self), self.gather(labels)

    def gather(self, part: Tensor) -> Tensor:
        """The processes' parts, one after the other."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts)


def _few(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The large ones, then all small ones of a type as one, which they take back when the loop goes on: a message costs
    time however short it is."""
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() > SMALL:
            yield tensor
        else:
            small.setdefault(tensor.dtype, []).append(tensor)
    for same in small.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        yield flat
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


class _Gather(torch.autograd.Function):
    """The gradient is a process's own part, times the number of processes: each backs up the whole batch's loss, and
    DistributedDataParallel takes the mean."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.rows = ranks, part.shape[0]
        return ranks.gather(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        start = ctx.ranks.rank * ctx.rows
        return gradient[start : start + ctx.rows] * ctx.ranks.count, None


def ranks_of(number: int) -> Ranks | None:
    """The processes of this number, which their loss keeps alive; None: 0, a process of its own."""
    return _known[number] if number else None


def ranks_for(process_group: Any) -> Ranks | None:
    """What the loss's process_group stands for. UserError where it is none."""
    if process_group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError(
            f"process_group is {process_group!r} and torch.distributed is not initialized; call "
            "torch.distributed.init_process_group first"
        )
    if process_group == "world":
        process_group = dist.group.WORLD
    if not isinstance(process_group, dist.ProcessGroup):
        raise UserError(f"process_group is {process_group!r}; it must be None, 'world' or a torch.distributed group")
    if dist.get_rank(process_group) < 0:
        raise UserError("process_group does not hold this process; it must be a group that does")
    return Ranks(process_group)
