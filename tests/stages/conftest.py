"""Fixtures that run a test once for every backend of the stages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stages.backends import (
    CPP,
    CPP_EVERYWHERE,
    EMULATED,
    GPU,
    GPU_EVERYWHERE,
    TRITON,
    TRITON_BETWEEN_PRODUCTS,
    Backend,
    Emulated,
    in_force,
)

_SIMULATED, _SLOW, _GPU = pytest.mark.simulated, pytest.mark.slow, pytest.mark.gpu
_BACKENDS = [
    *((backend, []) for backend in CPP),
    *((backend, [_SLOW]) for backend in CPP_EVERYWHERE),
    (TRITON, [_SIMULATED]),
    (EMULATED, [_SIMULATED]),
    *((backend, [_GPU]) for backend in GPU),
    *((backend, [_GPU, _SLOW]) for backend in GPU_EVERYWHERE),
]


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """One thread. With tensors this small, further threads would only wait for each other."""


@pytest.fixture(params=[pytest.param(backend, marks=marks, id=str(backend)) for backend, marks in _BACKENDS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every implementation, and C++ with each instruction set that this processor has."""
    with in_force(request.param) as found:
        yield found


@pytest.fixture(params=CPP, ids=str)
def cpp(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """C++ with each instruction set."""
    with in_force(request.param) as found:
        yield found


@pytest.fixture
def triton() -> Backend:
    """Triton's interpreter, for tests marked `simulated`."""
    return TRITON


@pytest.fixture
def between_products() -> Backend:
    """Triton with the edge MLP's products left to the library, as they are in fp64."""
    return TRITON_BETWEEN_PRODUCTS


@pytest.fixture
def emulator() -> Emulated:
    """The emulated CUDA kernels, for tests marked `simulated`."""
    return EMULATED
