"""Which implementation runs: by name or not at all, "auto" by the op's list, and what is said about it."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import pytest
import torch

from gcahng import UserError, native
from gcahng.ops import _implementations
from gcahng.ops._implementations import NAMES, Op, available, resolve


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pure Python install."""
    missing = native.Library(None, "it was not built (no C++ compiler)")
    monkeypatch.setattr(native, "load", lambda name: missing)
    monkeypatch.setattr(_implementations, "_said", set())


def test_reference_and_torch_are_there_on_the_cpu() -> None:
    assert available("reference", "cpu") is None
    assert available("torch", "cpu") is None


@pytest.mark.usefixtures("no_libraries")
def test_by_name_is_never_replaced() -> None:
    with pytest.raises(UserError, match=r"impl='cpp' is not available for loss on cpu: .*no C\+\+ compiler"):
        resolve("cpp", "cpu", "loss")


@pytest.mark.usefixtures("no_libraries")
def test_auto_warns_once_about_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gcahng"):
        assert resolve("auto", "cpu", "loss", torch.float32) == "torch"
        assert resolve("auto", "cpu", "loss", torch.float32) == "torch"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "loss on cpu uses impl='torch'; cpp is not: it was not built (no C++ compiler)" in record.getMessage()


def test_auto_informs_once_about_the_best(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_implementations, "_said", set())
    with caplog.at_level(logging.INFO, logger="gcahng"):
        assert resolve("auto", "cpu", "loss", torch.float32) == "cpp"
        assert resolve("auto", "cpu", "loss", torch.float32) == "cpp"
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "uses impl='cpp'" in record.getMessage()


def test_other_devices_get_what_runs_anywhere() -> None:
    assert resolve("auto", "mps", "loss", torch.float32) == "torch"
    for name in ("cpp", "cuda", "triton"):
        with pytest.raises(UserError, match=f"impl='{name}' is not available for loss on mps: it runs on"):
            resolve(name, "mps", "loss")


def test_an_op_without_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_implementations.OPS, "some_op", Op(cpu=("reference",), cuda=("reference",)))
    assert resolve("auto", "cpu", "some_op") == "reference"
    with pytest.raises(UserError, match="some_op has no such implementation; it has reference"):
        resolve("cpp", "cpu", "some_op")


def test_interpreter_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in (available("triton", "cpu") or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available("triton", "cpu") is None
    assert "bfloat16" in (available("triton", "cpu", "loss", torch.bfloat16) or "")


def test_every_name_has_an_answer_on_cuda_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in NAMES:
        assert available(name, "cuda"), name


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "torch"), ((8, 0), "cuda"), ((12, 0), "cuda")])
def test_a_gpu_that_no_kernel_is_built_for(
    capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "load", lambda name: native.Library(Path("_C_cuda.so"), None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(_implementations, "_said", set())
    assert resolve("auto", "cuda", "loss", torch.float32) == chosen
    assert ("of compute capability 8.0 or newer, and this one has 7.5" in caplog.text) is (chosen == "torch")


def test_a_library_that_does_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    load = native.load.__wrapped__
    assert "python setup.py build_ext --inplace" in (load("_C_cpu").reason or "")
    (tmp_path / "_native_build.json").write_text('{"_C_cpu": "no cmake"}')
    assert load("_C_cpu").reason == "_C_cpu was not built (at build time: no cmake)"
    (tmp_path / "_C_cpu.so").write_bytes(b"not a library")
    assert "_C_cpu.so does not load" in (load("_C_cpu").reason or "")


def test_cpu_arch_is_checked() -> None:
    before = native.cpu_arch()
    assert before in native.CPU_ARCHES
    native.set_cpu_arch("base")
    assert native.cpu_arch() == "base"
    native.set_cpu_arch(before)
    with pytest.raises(UserError, match="cpu_arch is 'sse9'; it must be one of base, avx2, avx512"):
        native.set_cpu_arch("sse9")


@pytest.mark.skipif("GCAHNG_CPU_ARCH" in os.environ, reason="it chooses another")
def test_the_best_instruction_set_is_chosen() -> None:
    before, had = native.cpu_arch(), []
    for arch in native.CPU_ARCHES:
        with contextlib.suppress(UserError):
            native.set_cpu_arch(arch)
            had.append(native.cpu_arch())
    native.set_cpu_arch(before)
    assert had[0] == "base" and before == had[-1]
