"""Notices training loops that would train wrongly without an error of their own, and says what would be right."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gcahng.errors import UserError
from gcahng.losses.base import held_modules

# A loss that is weighted this much is taken for one that a GradScaler has scaled (its scale starts at 65,536). The
# graph network's gradients are clipped to ± clip_value, so that such a weight would spoil its training as well.
LARGEST_WEIGHT = 1000.0
FORWARDS_WITHOUT_STEP = 20
STEPS_WITHOUT_EPOCH = 2000

MISUSES = (
    "the graph network's weights changed between the loss's forward and generator_step; only generator_step may step "
    "them, and another optimizer would step each of them twice: give it model.parameters(), and gca.base_parameters() "
    "if the base loss has parameters, but not gca.parameters()",
    "the loss's gradient was multiplied by {factor}, which the scaler of generator_step does not explain; scaler must "
    "be the GradScaler that scaled the loss: gca.generator_step(scaler) (a weight of the loss must be under 1000)",
    "scaler is a GradScaler, and the loss's gradient was not scaled by it; call scaler.scale(loss).backward() before, "
    "or leave scaler out",
)

# pytorch-metric-learning's losses and miners that gather the other processes' embeddings, by module and class. They are
# known by name so that the library need not be imported.
_GATHERING_MODULES = ("pytorch_metric_learning.utils.distributed", "pytorch_metric_learning.distributed")  # 2 and 3
_GATHERING = ("DistributedLossWrapper", "DistributedMinerWrapper")
_GATHERS = ("gather", "alltoall", "all_to_all", "send")  # in the names of torch.distributed's operators


@dataclass
class Trace:
    """What is remembered of a training forward until its generator step.

    Attributes:
        weights: a few weights of the loss as the forward found them (see `sample`), 1-dim.
        upstream: the gradient that a backward has brought to the loss, 0-dim; None before the backward.
    """

    weights: Tensor
    upstream: Tensor | None = None

    def follow(self, loss: Tensor) -> None:
        """Notes the gradient that a backward brings to a loss, 0-dim."""
        if loss.requires_grad and not torch.compiler.is_compiling():
            loss.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        self.upstream = gradient.detach()

    def __reduce__(self) -> tuple[type[Trace], tuple[Tensor]]:
        """A copy has seen no backward: copies of parameters have no gradients."""
        return Trace, (self.weights,)


def sample(network: nn.Module, classifier: nn.Linear) -> Tensor:
    """Copies a few weights, of which a step of any optimizer changes some.

    Values alone show a step. Version counters do not: fused optimizers leave them as they are, as does writing to
    `.data`. And weights that were swapped for an average and back have the values they had.

    Args:
        network: the graph network. Its first and last linear maps have gradients in every backward.
        classifier: the loss's classifier.

    Returns:
        1-dim.
    """
    ends = (network.node_input, network.class_head)
    parts = [part for linear in ends for part in (linear.bias.detach(), linear.weight.detach()[0])]
    return torch.cat([*parts, classifier.bias.detach()])


def misuses(trace: Trace, now: Tensor, scale: Tensor | None) -> Tensor:
    """Finds which of MISUSES a training step shows, on its device and without a synchronization.

    Args:
        trace: of the forward.
        now: the weights of which the trace has a copy (see `sample`).
        scale: the GradScaler's scale, 0-dim; None without one.

    Returns:
        (3,) bool.
    """
    bits = torch.int64 if now.dtype is torch.float64 else torch.int32  # NaN differs from itself, its bits do not
    changed = (trace.weights.view(bits) != now.view(bits)).any()
    if trace.upstream is None:
        return torch.stack((changed, *torch.zeros_like(changed).expand(2)))
    factor = trace.upstream.abs()
    if scale is None:
        return torch.stack((changed, factor >= LARGEST_WEIGHT, torch.zeros_like(changed)))
    return torch.stack((changed, factor >= LARGEST_WEIGHT * scale, (factor == 1) & (scale >= LARGEST_WEIGHT)))


def raise_for_misuse(found: list[bool], trace: Trace | None) -> None:
    """Reports the first misuse, if there is one.

    Args:
        found: what `misuses` found.
        trace: of the last training forward that it looked at, if it is known.

    Raises:
        UserError: there is one.
    """
    for text, present in zip(MISUSES, found, strict=True):
        if present:
            upstream = None if trace is None else trace.upstream
            raise UserError(text.format(factor="much" if upstream is None else f"{float(upstream):g}"))


@dataclass
class Watch:
    """What a loss remembers of the loop that it is in.

    Attributes:
        forwards: training forwards since the last generator step.
        said: the warnings that were given. Each is given once.
        trace: of the last generator step's forward, until its checks are read.
        base_is_known: whether a base loss was seen not to gather by itself.
    """

    forwards: int = 0
    said: set[str] = field(default_factory=set)
    trace: Trace | None = None
    base_is_known: bool = False

    def forward(self, before: Trace | None, process_group: Any) -> None:
        """Called by the loss's forward in training mode.

        Args:
            before: the trace of a training forward that had no generator step; None where there is none, or where
                nothing of the graph network trains.
            process_group: the loss's option.
        """
        self.forwards += 1
        if process_group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._warn(
                "process_group",
                f"process_group is None among {dist.get_world_size()} processes of torch.distributed: each process's "
                "graph network trains by itself, and they drift apart; pass process_group='world' so that they share "
                "each batch, or process_group='alone' if that is what you want",
            )
        if before is not None and before.upstream is not None:
            self._warn(
                "accumulation",
                "a second training forward follows a backward without gca.generator_step() in between: the first "
                "batch never trains the graph network; call gca.generator_step() after every loss.backward() (gradient "
                "accumulation is not supported)",
            )
        if self.forwards == FORWARDS_WITHOUT_STEP and "accumulation" not in self.said:
            self._warn(
                "step",
                f"{self.forwards} forwards in training mode without generator_step(): the graph network does not "
                "train, and J_syn weighs next to nothing; call gca.generator_step() after every loss.backward(), or "
                "gca.eval() before a forward that only measures",
                again=True,
            )

    def step(self, steps_in_epoch: int, steps_per_epoch: int | None) -> None:
        """Called by generator_step.

        Args:
            steps_in_epoch: generator steps since the last epoch's end.
            steps_per_epoch: the loss's option.
        """
        if steps_per_epoch is None and steps_in_epoch > STEPS_WITHOUT_EPOCH:
            self._warn(
                "epoch",
                f"{steps_in_epoch} generator steps without end_epoch(): the running means keep their start "
                "values, so J_syn weighs next to nothing; call gca.end_epoch() after every epoch, or set "
                "steps_per_epoch",
                frames=4,
            )

    def _warn(self, name: str, text: str, *, frames: int = 6, again: bool = False) -> None:
        """Warns once.

        Args:
            name: of the warning.
            text: what it says.
            frames: how far up the caller of the loss is; 6 through Module.__call__.
            again: whether it is given each time.
        """
        if again or name not in self.said:
            self.said.add(name)
            warnings.warn(text, stacklevel=frames)

    def around_base(self, rows: int, shared: bool) -> AbstractContextManager[Any]:
        """The context in which the base loss is called. It refuses one that gathers by itself.

        Args:
            rows: of the whole batch.
            shared: whether the batch was gathered from several processes.
        """
        return _NoGathering(rows, self) if shared and not self.base_is_known else nullcontext()


class _NoGathering(TorchDispatchMode):
    """Refuses operators that hand the rows of the whole batch to other processes."""

    def __init__(self, rows: int, watch: Watch) -> None:
        super().__init__()
        self.rows, self.watch = rows, watch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace and any(word in func.__name__ for word in _GATHERS):
            tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if any(t.dim() and t.shape[0] == self.rows for t in tensors):
                raise UserError(_gathers_twice("base", f"calls {func}"))
        return func(*args, **(kwargs or {}))

    def __exit__(self, kind: Any, *error: Any) -> None:
        super().__exit__(kind, *error)
        self.watch.base_is_known = kind is None


def refuse_gathering(base: Any, miner: Any) -> None:
    """Refuses a base loss or miner that is known to gather the other processes' embeddings.

    Args:
        base: of a loss with a process_group.
        miner: of that loss.

    Raises:
        UserError: one of them does.
    """
    for argument, value in (("base", base), ("miner", miner)):
        for part in (part for held in held_modules(value) for part in held.modules()):
            for cls in type(part).__mro__:
                if cls.__module__.startswith(_GATHERING_MODULES) and cls.__name__ in _GATHERING:
                    raise UserError(_gathers_twice(argument, f"holds a {cls.__name__}"))


def _gathers_twice(argument: str, why: str) -> str:
    return (
        f"{argument} gathers the batch from the other processes (it {why}), and process_group has gathered it already; "
        f"{argument} must work on the whole batch as it is, without such a wrapper"
    )


def refuse_vmap(what: str, tensors: Iterable[Tensor], unless: str) -> None:
    """Refuses torch.vmap where the loss would read, on the host, values that are not there.

    Args:
        what: is called.
        tensors: that it takes.
        unless: how it can be mapped.

    Raises:
        UserError: one of the tensors is a part of a mapped one.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return
    if any(_is_mapped(t) for t in tensors):
        raise UserError(f"{what} is called within torch.vmap; it must be called in a loop, batch by batch ({unless})")


def _is_mapped(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
