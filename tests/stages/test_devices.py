"""Stages in plain torch, which runs on any device, and the check of the stages itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stages.backends import CPP, CUDA
from stages.cases import Run, Setup, mapped
from stages.checks import STAGES, check_stage, inputs_of
from stages.test_edge_update import mlp_backward
from stages.test_planted_stage_errors import STEMS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gcahng.engine.stages.mlp_in import FusedMlpIn


class Yes(TorchDispatchMode):
    """Answers what asks for the values of tensors that have none."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), named: dict | None = None) -> Any:
        if function in (torch.ops.aten.equal.default, torch.ops.aten._local_scalar_dense.default):
            return True
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("stage", STAGES.values(), ids=str)
def test_no_tensor_of_a_stage_is_beside_its_device(stage, monkeypatch):
    """Tensors that say they are on a GPU, and hold nothing: one on the CPU among them raises."""
    setup = Setup(3, 3, 8, 40, p=0.3)
    monkeypatch.setattr(torch.testing, "assert_close", lambda *_, **__: None)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda _: 0)
    inputs = inputs_of(setup, "float32")
    with FakeTensorMode(allow_non_fake_inputs=True), Yes():
        on_gpu = mapped(lambda x: torch.empty(x.shape, dtype=x.dtype, device=CUDA), inputs)
        found = stage.results(Run(setup, on_gpu))
        assert found and {tensor.device.type for tensor in found.values()} == {"cuda"}


def test_every_stem_has_its_stages():
    assert {name.partition(".")[0] for name in STAGES} == {stem.removeprefix("test_") for stem in STEMS}


def test_a_wrong_stage_is_found(monkeypatch):
    right = FusedMlpIn.backward

    def wrong(*arguments: Any) -> Any:
        g, dh = right(*arguments)
        return g, dh.mul_(1.001)

    monkeypatch.setattr(FusedMlpIn, "backward", wrong)
    cpp = next(backend for backend in CPP if len(backend.setups["rows"]) > 1)
    with pytest.raises(AssertionError, match="edge_update.mlp_backward, cpp-.*float32: .* off by"):
        check_stage(cpp, mlp_backward, [(cpp.setups["rows"][0], "float32")])
