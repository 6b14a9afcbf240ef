"""What a training step is off by, over several draws of one problem: its weights and embeddings, moved by a rounding.

Every implementation gets the same draws, and each draw has its own truth, so that what is measured is rounding alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from engine_cases import Case, assert_same_keys, cancels, error, run_step, scale_of
from torch import Tensor

import gcahng
from gcahng.testing import moved
from gcahng.testing.compare import assert_as_exact_as_plain

DRAWS = 6
NUMBERS = "numbers"  # losses, which are one number each: a single error may be anything, so they are taken together

Errors = dict[str, list[float]]


class Variant(NamedTuple):
    """What runs the step: implementation, dtypes, in how many of the draws, and a context that plants a fault."""

    impl: str
    dtype: torch.dtype = torch.float32
    edge_dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
    draws: int = DRAWS
    fault: Callable[[], AbstractContextManager] = nullcontext


def drawn(case: Case, variant: Variant, by: torch.dtype, draw: int) -> tuple[gcahng.GCAHNGLoss, Tensor, Tensor]:
    """The loss, embeddings and labels of a draw: the first is the case's own, the others are moved by one rounding."""
    z, labels = case.batch(dtype=torch.float32)
    options = {} if variant.edge_dtype is None else {"edge_dtype": variant.edge_dtype}
    gca = case.loss(variant.impl, variant.dtype, **options)
    if draw > 0:
        generator = torch.Generator().manual_seed(draw)
        z = moved(z, by, generator)
        with torch.no_grad():
            for parameter in gca.parameters():
                parameter.copy_(moved(parameter.float(), by, generator))
    return gca, z.to(variant.dtype), labels


def relative_errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """max |found - truth| of each tensor, relative to its size; numbers as one, in the mean. Counts must be equal."""
    assert_same_keys(found, truth)
    errors, numbers = {}, []
    for name, tensor in truth.items():
        if not tensor.is_floating_point():
            assert torch.equal(found[name], tensor), name
            continue
        assert found[name].isfinite().all(), name
        off = error(found[name], tensor) / scale_of(name, truth)
        if tensor.dim() == 0:
            numbers.append(off)
        else:
            errors[name] = off
    return errors | {NUMBERS: math.sqrt(sum(x * x for x in numbers) / len(numbers))}


def draw_errors(case: Case, variants: Mapping[Hashable, Variant]) -> dict[Hashable, Errors]:
    """The relative errors of each variant, by tensor, in each draw. Draws are moved by a rounding of what the variants
    compute in: of bf16 if one of them runs under autocast."""
    by = torch.bfloat16 if any(variant.autocast for variant in variants.values()) else torch.float32
    found: dict[Hashable, Errors] = {key: {} for key in variants}
    for draw in range(max(variant.draws for variant in variants.values())):
        gca, z, labels = drawn(case, Variant("reference", torch.float64), by, draw)
        truth = run_step(gca, z, labels)
        for key, variant in variants.items():
            if draw < variant.draws:
                gca, z, labels = drawn(case, variant, by, draw)
                with variant.fault():
                    step = run_step(gca, z, labels, autocast=variant.autocast)
                assert step["loss"].dtype is step["dz"].dtype is variant.dtype
                for name, off in relative_errors(step, truth).items():
                    found[key].setdefault(name, []).append(off)
    return found


def assert_errors(case: Case, variant: Variant, actual: Errors, plain: Errors, factor: float = 2.0) -> None:
    """As exact as plain PyTorch: see assert_as_exact_as_plain.

    Where a gradient cancels (the reference sums n² terms, the engine n) √n eps of its scale is allowed on top, n
    roundings of either sign.
    """
    rounding = torch.finfo(variant.dtype).eps / 2
    compute = variant.edge_dtype or variant.autocast or variant.dtype
    of_sums = math.sqrt(case.classes * case.views) * torch.finfo(compute).eps
    allowed = {name: of_sums if cancels(name) else rounding for name in actual}
    assert_as_exact_as_plain(actual, plain, allowed, factor=factor)
