"""Each Triton stage against plain torch, in Triton's interpreter where there is no GPU: fp32, fp64 and fp16 products
(it computes bf16 wrongly), poisoned memory, and the same bits twice."""

from __future__ import annotations

import pytest
import torch
from stage_cases import Setup
from stage_checks import (
    STAGES,
    check_moments,
    check_stage,
    check_store_in_bfloat16,
    check_variance_of_edges_far_from_zero,
    run_of,
    wanted,
)

PRECISIONS = ("float64", "float32", "float16")

# Tied and apart, tiles of one class and of several, odd channels, more of them than one column block of a product has;
# small, for the interpreter takes milliseconds a program.
SETUPS = [
    Setup(6, 3, 19, 60, p=0.3),
    Setup(5, 2, 150, 40, symmetric=False, p=0.5),
    Setup(3, 8, 33, 200, p=0.1),
    Setup(4, 2, 64, 100),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_stage(setup, stage, precision):
    check_stage(setup, stage, precision, "triton")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("setup", SETUPS[:2], ids=str)
def test_store_in_bfloat16(setup, precision):
    check_store_in_bfloat16(setup, precision, "triton")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("setup", SETUPS[:2], ids=str)
def test_moments(setup, precision):
    check_moments(setup, precision, "triton")


def test_variance_of_edges_far_from_zero():
    check_variance_of_edges_far_from_zero("triton")


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("stage", STAGES)
def test_same_bits_twice(stage, precision):
    setup = SETUPS[0]
    arguments = wanted(setup, stage, precision).arguments
    first, second = (getattr(run_of(setup, precision, "triton"), stage)(*arguments) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
