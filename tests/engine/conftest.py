"""Tiles of a chosen size, instruction sets of the C++ stages, and the calls of their ops in a training step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_cases import Case, run_step
from torch import Tensor

from gcahng import UserError, _native
from gcahng.engine.schema import OPS, Ops


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are small: threads would only wait for each other. OMP_NUM_THREADS may ask for them all the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=_native.CPU_ARCHES)
def arch(request) -> Iterator[str]:
    """Each instruction set that this processor has, in force."""
    before = _native.cpu_arch()
    assert before is not None, _native.load("_C_cpu").reason
    try:
        _native.set_cpu_arch(request.param)
    except UserError as error:
        pytest.skip(str(error))
    assert _native.cpu_arch() == request.param
    yield request.param
    _native.set_cpu_arch(before)


@pytest.fixture
def tiles(monkeypatch):
    """Sets how many edges a tile holds."""

    def use(case: Case) -> None:
        if case.tile_rows is not None:
            monkeypatch.setattr("gcahng.engine.operators.default_tile_rows", lambda *_: case.tile_rows)

    return use


class RecordedOps(Ops):
    """The C++ ops, which keep the arguments of each op's first calls, apart: none aliases another."""

    def __init__(self, at_most: int) -> None:
        super().__init__("cpp")
        self.calls: dict[str, list[tuple]] = {}
        self._at_most = at_most

    def overload(self, name: str) -> Any:
        run = super().overload(name)

        def call(*arguments: Any) -> None:
            recorded = self.calls.setdefault(name, [])
            if len(recorded) < self._at_most:
                recorded.append(tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in arguments))
            run(*arguments)

        return call


@pytest.fixture
def recorded(monkeypatch, tiles):
    """Runs a training step in fp32 with the C++ stages, and gives what each stage op was called with."""

    def record(case: Case, at_most: int, autocast: torch.dtype | None = None) -> dict[str, list[tuple]]:
        ops = RecordedOps(at_most)
        monkeypatch.setattr("gcahng.engine.operators.ops_of", lambda implementation: ops)
        tiles(case)
        z, labels = case.batch(dtype=torch.float32)
        run_step(case.loss("cpp", torch.float32), z, labels, autocast=autocast)
        assert ops.calls.keys() == OPS.keys(), "every op occurs in a step"
        return ops.calls

    return record
