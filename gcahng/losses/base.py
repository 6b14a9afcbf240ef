"""The loss on real samples, J_m, where it is a module that the user gives: its miner, and what it may hide."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from torch import Tensor, nn

from gcahng.errors import UserError
from gcahng.losses.layout import describe

IndicesTuple = tuple[Tensor, ...]
"""The pairs or triplets that a miner of pytorch-metric-learning found: 4 or 3 tensors of rows."""

Base = Callable[..., Tensor]


def check_base(base: str | Base, miner: Callable[..., IndicesTuple] | None) -> None:
    """Checks base and miner, and warns of a function that hides trainable parameters.

    Args:
        base: of GCAHNGLoss.
        miner: of GCAHNGLoss.

    Raises:
        UserError: one of them is not what it must be.
    """
    if base != "npair" and not callable(base):
        raise UserError(f'base is {base!r}; it must be "npair" or a module called as base(embeddings, labels)')
    if miner is not None and not callable(miner):
        raise UserError(f"miner is {miner!r}; it must be None or a miner called as miner(embeddings, labels)")
    if miner is not None and base == "npair":
        raise UserError(
            'miner is given and base is "npair", which takes all pairs; base must be a loss that is called '
            "as base(embeddings, labels, indices_tuple)"
        )
    if base == "npair" or isinstance(base, nn.Module):
        return
    hidden = next((module for module in held_modules(base) if any(True for _ in module.parameters())), None)
    if hidden is not None:
        warnings.warn(
            f"base is {_name(base)}, which hides the parameters of {type(hidden).__name__}: base_parameters(), "
            "state_dict() and to() do not see them; pass the module itself as base (and a miner as miner)",
            stacklevel=4,  # the line that makes the loss
        )


def check_mined(base: str | Base, indices_tuple: IndicesTuple | None, shared: bool) -> None:
    """Refuses pairs that the base loss would not get, or whose rows would be other ones.

    Args:
        base: of GCAHNGLoss.
        indices_tuple: of the forward.
        shared: whether several processes share the batch.

    Raises:
        UserError: there are such pairs.
    """
    if indices_tuple is None:
        return
    if base == "npair":
        raise UserError(
            'indices_tuple is given and base is "npair", which takes all pairs of the batch; base must be a loss that '
            "is called as base(embeddings, labels, indices_tuple)"
        )
    if shared:
        raise UserError(
            "indices_tuple is given, and with a process_group its rows would be those of a part of it; the miner "
            "must be given to the loss, as miner="
        )


def base_loss(
    base: Base,
    miner: Callable[..., IndicesTuple] | None,
    embeddings: Tensor,
    labels: Tensor,
    indices_tuple: IndicesTuple | None,
) -> Tensor:
    """J_m of a batch, 0-dim.

    Args:
        base: called as base(embeddings, labels), or with the pairs as third argument where there are any.
        miner: called as miner(embeddings, labels); its pairs go to the base.
        embeddings: (n, D), in the caller's order.
        labels: (n,).
        indices_tuple: pairs or triplets that were mined before, in the place of the miner's.

    Raises:
        UserError: there are pairs and a miner, or the base returned no loss.
    """
    if miner is not None:
        if indices_tuple is not None:
            raise UserError("indices_tuple is given, and the loss has a miner; the pairs must come from one of them")
        indices_tuple = miner(embeddings, labels)
    mined = () if indices_tuple is None else (indices_tuple,)
    metric = base(embeddings, labels, *mined)
    if not isinstance(metric, Tensor) or metric.dim():
        raise UserError(f"base returned {describe(metric)}; it must return its loss, a 0-dim tensor")
    return metric


def held_modules(function: Any, depth: int = 3) -> Iterator[nn.Module]:
    """The modules that a callable which is no module itself holds: in a closure, as a default, by name, or bound.

    Args:
        function: a lambda, function, bound method, functools.partial or other callable object.
        depth: how many callables within one another are looked into.
    """
    if isinstance(function, nn.Module):
        yield function
        return
    if depth == 0:
        return
    for value in _held(function):
        if isinstance(value, nn.Module) or (callable(value) and not isinstance(value, type)):
            yield from held_modules(value, depth - 1)


def _held(function: Any) -> Iterator[Any]:
    """What a callable refers to."""
    if isinstance(function, functools.partial):
        yield from (function.func, *function.args, *function.keywords.values())
    elif inspect.ismethod(function):
        yield from (function.__self__, function.__func__)
    elif inspect.isfunction(function):
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # it is not filled yet
                continue
        yield from (function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__)
    elif hasattr(function, "__dict__"):
        yield from vars(function).values()


def _names(code: CodeType) -> Iterator[str]:
    """The global names and attributes that a function's code uses, those of functions within it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _name(function: Any) -> str:
    return (
        f"the function {function.__qualname__}" if hasattr(function, "__qualname__") else f"a {type(function).__name__}"
    )
