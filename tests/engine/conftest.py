"""Tiles of a chosen size, the calls of the C++ ops in a training step, and captures without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture_cases import stand_in
from engine_cases import Case, run_step
from torch import Tensor

from gcahng.engine.schema import OPS, Ops


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """Threads would only wait for each other."""


@pytest.fixture
def tiles(monkeypatch):
    """Sets how many edges a tile holds."""

    def use(case: Case) -> None:
        if case.tile_rows is not None:
            monkeypatch.setattr("gcahng.engine.prepare.default_tile_rows", lambda *_: case.tile_rows)

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
        monkeypatch.setattr("gcahng.engine.prepare.ops_of", lambda implementation: ops)
        tiles(case)
        z, labels = case.batch(dtype=torch.float32)
        run_step(case.loss("cpp", torch.float32), z, labels, autocast=autocast)
        assert ops.calls.keys() == OPS.keys(), "every op occurs in a step"
        return ops.calls

    return record


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stand-in for CUDA graphs, and a list that grows by an item with each capture."""
    return stand_in(monkeypatch)
