"""Finds losses and gradients that are not finite before they reach a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gcahng.errors import UserError

_NAMED_IMAGES = 3


class NonFinite(UserError):
    """A loss or a gradient is infinite or NaN.

    Args:
        step: of the run, counted from 1.
        values: all values of the step, in the order in which they arise.
        images: the names of the batch's images.
        advice: what to do, which is added to the message.

    Attributes:
        step: of the run.
        values: those that are not finite.
        images: the names of the batch's images.
    """

    of_all = True  # all processes that share the batch raise it

    def __init__(self, step: int, values: Mapping[str, float], images: list[str], advice: str = "") -> None:
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        first, *others = bad
        message = f"{first} is {bad[first]} at step {step}"
        if others:
            message += f" (so {'is' if len(others) == 1 else 'are'} {', '.join(others)})"
        named, rest = images[:_NAMED_IMAGES], len(images) - _NAMED_IMAGES
        message += f"; the batch's images are {', '.join(named)}{f' and {rest} more' if rest > 0 else ''}"
        super().__init__(message + (f"; {advice}" if advice else ""))
        self.step, self.values, self.images = step, bad, images

    def with_advice(self, advice: str) -> NonFinite:
        """The same error, which also says what to do."""
        return NonFinite(self.step, self.values, self.images, advice)


def largest(gradients: list[Tensor]) -> Tensor:
    """The largest absolute entry, 0-dim; NaN if an entry is NaN. Unlike a sum of squares it does not overflow."""
    return nn.utils.get_total_norm(gradients, norm_type=float("inf"))


class FiniteWatch:
    """Looks at the values of each step.

    Args:
        deferred: whether a step's values are read one step later, so that nothing waits for the GPU. `settle` reads the
            last ones.
    """

    def __init__(self, deferred: bool) -> None:
        self._deferred = deferred
        self._unread: _Unread | None = None

    def look(self, step: int, values: Mapping[str, Tensor], images: Callable[[], list[str]]) -> None:
        """Take the values of a step.

        Args:
            step: of the run.
            values: 0-dim tensors by name.
            images: returns the names of the batch's images.

        Raises:
            NonFinite: a value is not finite; if deferred, one of the step before.
        """
        stacked = torch.stack([value.detach().float() for value in values.values()])
        if not self._deferred:
            _Unread(step, list(values), stacked, None, images).check()
            return
        event = None
        if stacked.is_cuda:
            host = torch.empty_like(stacked, device="cpu", pin_memory=True)
            stacked = host.copy_(stacked, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        names = images()
        self.settle()
        self._unread = _Unread(step, list(values), stacked, event, lambda: names)

    def settle(self) -> None:
        """Read the values that have not been read.

        Raises:
            NonFinite: see `look`. Each call raises it again, because the weights remain spoiled.
        """
        if self._unread is not None:
            self._unread.check()
            self._unread = None


class _Unread(NamedTuple):
    step: int
    names: list[str]
    values: Tensor
    event: torch.cuda.Event | None
    images: Callable[[], list[str]]

    def check(self) -> None:
        if self.event is not None:
            self.event.synchronize()
        if not bool(self.values.isfinite().all()):
            raise NonFinite(self.step, dict(zip(self.names, self.values.tolist(), strict=True)), self.images())
