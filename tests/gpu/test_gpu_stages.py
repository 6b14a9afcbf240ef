"""The engine's stages on a GPU, each implementation against plain torch in fp64. What is not slow is a quick check: it
compiles few kernels."""

from __future__ import annotations

import itertools

import pytest
from gcahng.ops._implementations import available
from on_device import SETUPS, STAGES, check_more_of_stages, check_stage, check_stage_twice
from stage_cases import Setup

pytestmark = pytest.mark.gpu
PRECISIONS = ("float64", "float32", "bfloat16")
IMPLEMENTATIONS = ("cuda", "triton", "cuda+triton")


def quick(setup: Setup, precision: str, impl: str) -> bool:
    if impl == "cuda+triton" or (impl == "triton" and precision == "float64"):
        return False
    return setup is SETUPS[0] or (setup.dim == 512 and precision == "bfloat16")


CASES = [
    pytest.param(*case, marks=[] if quick(*case) else [pytest.mark.slow], id="-".join(map(str, case)))
    for case in itertools.product(SETUPS, PRECISIONS, IMPLEMENTATIONS)
]


@pytest.fixture(autouse=True)
def there(impl: str) -> None:
    for part in impl.split("+"):
        reason = available(part, "cuda", "loss")
        assert reason is None, reason


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("setup", "precision", "impl"), CASES)
def test_stage(setup, stage, precision, impl):
    check_stage("cuda", setup, stage, precision, impl)


@pytest.mark.parametrize(("setup", "precision", "impl"), CASES)
def test_moments_and_storage(setup, precision, impl):
    check_more_of_stages("cuda", setup, precision, impl)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_same_bits_twice(stage, precision, impl):
    check_stage_twice("cuda", SETUPS[3], stage, precision, impl)
