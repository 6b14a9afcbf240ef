"""Compares a stage of a backend with plain torch: what it should give, and how near it must come."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from stages.backends import Backend, Emulated
from stages.cases import NARROW, PRECISIONS, Inputs, Results, Run, Setup, make_inputs, mapped
from torch import Tensor

from gcahng.testing import assert_close_to_truth, moved, nan_poisoned
from gcahng.testing.compare import assert_within

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stage:
    """The results of a stage over all tiles of a run.

    Attributes:
        name: "<stem>.<function>".
        results: the function that runs the stage. A stem's test writes it, so that it shows how the stage is called.
        kind: rows, tiles or negatives, which says what its setups differ in (see Backend.setups).
        products: whether one of its tensors is an operand of products, whose dtype may be narrower.
        edges: whether it takes edges, their gradients or coefficients, whose dtype may be narrower.
    """

    name: str
    results: Callable[[Run], Results]
    kind: str
    products: bool
    edges: bool

    def __str__(self) -> str:
        return self.name


STAGES: dict[str, Stage] = {}


def stage(kind: str, *, products: bool = True, edges: bool = True) -> Callable[[Callable[[Run], Results]], Stage]:
    """Declares a stage; see Stage."""

    def declare(results: Callable[[Run], Results]) -> Stage:
        stem = results.__module__.rpartition("test_")[2]
        found = Stage(f"{stem}.{results.__name__}", results, kind, products, edges)
        STAGES[found.name] = found
        return found

    return declare


@contextmanager
def case(*words: Any) -> Iterator[None]:
    """A context that adds the name of the case to an error."""
    try:
        yield
    except Exception as error:
        what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        raise AssertionError(f"{', '.join(map(str, words))}: {what}") from error


def inputs_of(setup: Setup, precision: str, device: torch.device = CPU) -> Inputs:
    """See make_inputs."""
    return mapped(lambda x: x.to(device), make_inputs(setup, PRECISIONS[precision]))


def run_of(backend: Backend, setup: Setup, precision: str, inputs: Inputs | None = None) -> Run:
    """A backend's stages on a setup, with its own inputs unless others are given."""
    return Run(setup, inputs_of(setup, precision, backend.device) if inputs is None else inputs, backend.ops)


def truth_of(setup: Setup, inputs: Inputs) -> Run:
    """Plain torch in fp64 on the same (rounded) inputs."""
    return Run(setup, mapped(Tensor.double, inputs))


class Wanted(NamedTuple):
    """The truth, and what plain torch gives at the precision: on the inputs, and on inputs that are moved by a
    rounding. A single run may be right by luck. Narrow edges stay as they are: sums over them are as exact as over
    others."""

    truth: Results
    plain: list[Results]


def _moved(x: Tensor, precision: str, generator: torch.Generator) -> Tensor:
    if precision == NARROW and x.dtype is torch.bfloat16:  # a rounding of edges would hide what fp32 sums are off by
        return x
    return moved(x.cpu(), x.dtype, generator).to(x.device)


@functools.cache  # for every backend
def wanted(stage: Stage, setup: Setup, precision: str, device: torch.device = CPU) -> Wanted:
    inputs = inputs_of(setup, precision, device)
    truth = stage.results(truth_of(setup, inputs))
    if precision == "float64":
        return Wanted(truth, [])
    # A generator each, so that what an input is moved by does not depend on those after it.
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    near = [mapped(lambda x, g=g: _moved(x, precision, g), inputs) for g in generators]
    return Wanted(truth, [stage.results(Run(setup, one)) for one in (inputs, *near)])


def check_stage(backend: Backend, stage: Stage, cases: Iterable[tuple[Setup, str]] | None = None) -> None:
    """Check all results of a stage in memory full of NaN.

    In fp64 they must be right to 1e-13 of the largest value, so every formula is right. Below, they must be as exact as
    plain torch, up to half a unit in the last place (assert_close_to_truth).
    """
    for setup, precision in backend.cases(stage) if cases is None else cases:
        with case(stage, backend, setup, precision):
            _check_results(stage, wanted(stage, setup, precision, backend.device), run_of(backend, setup, precision))


def _check_results(stage: Stage, wanted: Wanted, run: Run) -> None:
    with nan_poisoned():
        actual = stage.results(run)
    run.workspace.check()
    assert actual.keys() == wanted.truth.keys() and actual
    for name, truth in wanted.truth.items():
        if wanted.plain:
            assert_close_to_truth(actual[name], [found[name] for found in wanted.plain], truth, name=name)
        else:
            assert actual[name].dtype is torch.float64 and actual[name].shape == truth.shape, name
            off = (actual[name] - truth).abs().max().item()
            assert_within(off, 1e-13 * truth.abs().max().item(), f"{name} in fp64")


def check_same_bits(backend: Backend, stage: Stage) -> None:
    """Check that two runs give the same bits. In the emulator, the order of warps differs between them."""
    orders = [backend.ordered(seed) for seed in (-1, 0, 1, 2)] if backend.emulated else [backend, backend]
    for setup, precision in itertools.product(backend.setups_twice(stage), backend.precisions(stage, of_bits=True)):
        first, *others = (stage.results(run_of(one, setup, precision)) for one in orders)
        with case(stage, backend, setup, precision):
            assert first
            for other in others:
                assert first.keys() == other.keys()
                assert not [name for name in first if not torch.equal(first[name], other[name])]


def check_unaligned(emulator: Emulated, stage: Stage) -> None:
    """Check addresses that wide accesses do not fit, for all tensors at once and for each alone. A kernel must ask each
    tensor whether it is aligned."""
    for backend, setup, precision in emulator.unaligned(stage):
        check_stage(backend, stage, [(setup, precision)])


def check_outputs_on_their_own(write: Callable[[Tensor | None, Tensor | None], None], like: Tensor, low: torch.dtype):
    """Check that the output in the accumulating dtype and the narrow one are the same alone as together.

    Args:
        write: writes into both, or into the one that is given.
        like: a tensor of the first one's shape.
        low: dtype of the second.
    """
    full, again = (torch.full_like(like, torch.nan) for _ in range(2))
    narrow, narrow_again = (torch.full_like(like, torch.nan, dtype=low) for _ in range(2))
    write(full, narrow)
    write(again, None)
    write(None, narrow_again)
    assert bool(full.isfinite().all()) and torch.equal(full.to(low), narrow)
    assert torch.equal(again, full) and torch.equal(narrow_again, narrow)


def check_sum(found: Tensor, terms: Tensor) -> None:
    """Check a sum of a few thousand terms, which in any order is off by a few roundings of the terms' sizes."""
    size = terms.double().abs().sum(dim=0)
    assert bool(((found.double() - terms.double().sum(dim=0)).abs() <= 4 * torch.finfo(found.dtype).eps * size).all())
