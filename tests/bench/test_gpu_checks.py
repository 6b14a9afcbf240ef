"""What tests/gpu checks on a device and how it chooses products, on the CPU: it may not break unseen."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import on_device
import pytest
import sanitized
import torch
from engine_cases import Case as EngineCase

from gcahng.bench.agreement import Agreement
from gcahng.bench.cases import Case, Problem
from gcahng.bench.peak import from_json, to_json
from gcahng.errors import UserError

# -- cases for a device


def test_cases_for_a_device() -> None:
    case = Case(12, device="cuda", precision="tf32", impl="reference", compiled=True)
    assert case.rounding == 2**-11 and case.compute is torch.float32
    assert from_json(to_json(case)) == case
    with pytest.raises(UserError, match="precision is 'tf32'; it must be one of fp32, bf16, fp64"):
        Case(12, precision="tf32")
    with pytest.raises(UserError, match="compiled is True and impl is 'cpp'"):
        Case(12, impl="cpp", compiled=True)
    with pytest.raises(UserError, match="device is 'tpu'"):
        Case(12, device="tpu")


def test_products_are_what_the_precision_says() -> None:
    before = torch.get_float32_matmul_precision()
    for precision, wanted in (("tf32", "high"), ("fp32", "highest"), ("bf16", "highest")):
        with Problem.products(SimpleNamespace(case=Case(12, precision=precision, device="cuda"))):
            assert torch.get_float32_matmul_precision() == wanted
        assert torch.get_float32_matmul_precision() == before
    with Problem.products(SimpleNamespace(case=Case(12))):
        assert torch.get_float32_matmul_precision() == before


def test_a_compiled_reference_is_the_reference(monkeypatch) -> None:
    compiled = []

    def compile_(function: Any) -> Any:
        compiled.append(function.__name__)
        return partial(function)

    monkeypatch.setattr(torch, "compile", compile_)
    case = Case(12, 3, 16, 1, impl="reference", compiled=True)
    assert Agreement(case).problem(case) is None
    assert compiled == ["metric_pass", "generator_pass"]
    assert replace(case, compiled=False).name + " compiled" == case.name


# -- what tests/gpu checks


def test_steps_on_a_device() -> None:
    on_device.check_against_reference("cpu", EngineCase(classes=3, dim=8), "cpp")
    on_device.check_precisions("cpu", "cpp", ("fp32",), n=12, dim=8)
    on_device.check_step_twice("cpu", "cpp", "bf16", n=12, dim=8)
    on_device.check_replay("cpu", "cpp")


def test_the_authors_numbers_on_a_device() -> None:
    on_device.check_golden_generate("cpu", "c5_k3_d16_l1_h2", "cpp")
    on_device.check_golden_training("cpu", "c5_k3_d16_l1_h2", "cpp")


def test_what_the_sanitizer_runs(capsys) -> None:
    sanitized.main("nothing", device="cpu")
    sanitized.main("cpp", "bf16", "cpu")
    assert capsys.readouterr().out.split() == ["ready", "finished"]
