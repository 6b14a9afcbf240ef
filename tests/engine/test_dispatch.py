"""Which implementation runs: by name or not at all, "auto" by the device's list, and what is said about it."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gcahng import UserError, availability, dispatch, env, native
from gcahng.dispatch import NAMES, Sizes, available, choose
from gcahng.engine.schema import NATIVE, TRITON
from gcahng.engine.stages import ops_of
from gcahng.env import report


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pure Python install."""
    missing = native.Library(None, "it was not built (no C++ compiler)")
    monkeypatch.setattr(native, "load", lambda name: missing)
    monkeypatch.setattr(dispatch, "_said", set())


def chosen_on(device: str) -> str:
    return dispatch.chosen("loss", "auto", torch.device(device), 3, 16, torch.float32)


def test_reference_and_torch_are_there_on_the_cpu() -> None:
    assert available("reference", "cpu") is None
    assert available("torch", "cpu") is None


@pytest.mark.usefixtures("no_libraries")
def test_by_name_is_never_replaced() -> None:
    with pytest.raises(UserError, match=r"impl is 'cpp', which is not available for loss on cpu: .*no C\+\+ compiler"):
        choose("cpp", "cpu")


@pytest.mark.usefixtures("no_libraries")
def test_auto_warns_once_about_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gcahng"):
        assert chosen_on("cpu") == "torch"
        assert chosen_on("cpu") == "torch"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "loss on cpu uses impl='torch'; not cpp: it was not built (no C++ compiler)" in record.getMessage()


def test_auto_informs_once_about_the_best(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.INFO, logger="gcahng"):
        assert chosen_on("cpu") == "cpp"
        assert chosen_on("cpu") == "cpp"
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "uses impl='cpp'" in record.getMessage()


def test_other_devices_get_what_runs_anywhere() -> None:
    assert choose("auto", "mps").implementation == "torch"
    for name in ("cpp", "cuda", "triton"):
        with pytest.raises(UserError, match=f"impl is '{name}', which is not available for loss on mps: it runs on"):
            choose(name, "mps")


def test_other_names_are_an_error() -> None:
    with pytest.raises(UserError, match="impl is 'numpy'; it must be one of auto, reference, torch, cpp, cuda, triton"):
        choose("numpy", "cpu")


def test_a_choice_says_why_no_better_one_runs(no_libraries: None) -> None:
    found = choose("auto", "cpu", what="channel_mix")
    assert found == ("torch", ("cpp: it was not built (no C++ compiler)",))


@pytest.mark.usefixtures("no_libraries")
def test_env_says_what_auto_takes_and_why() -> None:
    found = [
        line.split(maxsplit=3)
        for line in report().partition("impl='auto' chooses\n")[2].partition("\n\n")[0].splitlines()
    ]
    reason = "torch; not cpp: it was not built (no C++ compiler)"
    assert [line for line in found if line[2] == "cpu"] == [[what, "on", "cpu", reason] for what in dispatch.WHATS]


def test_interpreter_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = pytest.importorskip("gcahng.testing.interpreter")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in (available("triton", "cpu") or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available("triton", "cpu") is None
    monkeypatch.setattr(interpreter.InterpreterBuilder, interpreter.MARK, False, raising=False)
    assert "call gcahng.testing.interpreter.interpret_bfloat16() first" in available("triton", "cpu", torch.bfloat16)
    monkeypatch.setattr(interpreter.InterpreterBuilder, interpreter.MARK, True)
    assert available("triton", "cpu", torch.bfloat16) is None


def test_every_name_has_an_answer_on_cuda_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in NAMES:
        assert available(name, "cuda"), name


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [((7, 5), "torch"), ((8, 0), "cuda+triton"), ((12, 0), "cuda+triton")],
)
def test_a_gpu_that_no_kernel_is_built_for(
    capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "load", lambda name: native.Library(Path("_C_cuda.so"), None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(native, "unfit_device", lambda device: None)
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(availability, "_compiler_missing", lambda: None)
    assert chosen_on("cuda") == chosen
    assert ("of compute capability 8.0 or newer, and this one has 7.5" in caplog.text) is (chosen == "torch")


@pytest.mark.parametrize(
    ("impl", "sizes", "message"),
    [
        ("cpp", Sizes(65, 16), "it takes up to 64 samples a class, not 65; impl='torch' takes any number"),
        ("cuda", Sizes(3, 1025), "it takes up to 1024 channels, not 1025; impl='torch' takes any number"),
    ],
)
def test_what_fused_stages_do_not_take(
    impl: str, sizes: Sizes, message: str, all_there: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error where they were asked for by name; "auto" goes on to the next."""
    device = "cuda" if impl == "cuda" else "cpu"
    with pytest.raises(UserError, match=message):
        choose(impl, device, sizes)
    assert choose(impl, device, Sizes(64, 1024)).implementation == impl
    assert choose("auto", "cpu", Sizes(65, 16)).implementation == "torch"
    monkeypatch.setenv("GCAHNG_AUTO", "triton,mix_fwd_=cuda")  # one op in CUDA C++ is enough
    found = choose("auto", "cuda", Sizes(3, 1025))
    assert found.implementation == "triton" and "triton,mix_fwd_=cuda: it takes up to 1024" in found.passed[0]
    monkeypatch.delenv("GCAHNG_AUTO")
    found = choose("auto", "cuda", Sizes(3, 1025))
    assert found.implementation == "triton" and "cuda+triton: it takes up to 1024 channels" in found.passed[0]


# -- a library that does not fit the GPU, its driver or torch


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A newer GPU and an older one, and a _C_cuda whose first launch fails on any but the first."""
    source, library = tmp_path / "probe.c", tmp_path / "_C_cuda.so"
    source.write_text(
        "int current, fails_with = 209;"
        "int gcahng_cuda_probe(const char** said)"
        '{ *said = current ? "no kernel image is available" : ""; return current ? fails_with : 0; }'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)

    @contextlib.contextmanager
    def on_device(index: int) -> Iterator[None]:
        current = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "current")
        before, current.value = current.value, index
        yield
        current.value = before

    record = {"_C_cuda": {"cuda": "13.0.88", "architectures": "90a-real"}}
    capabilities, names = [(9, 0), (8, 6)], ["NVIDIA H100", "NVIDIA A10"]
    monkeypatch.setattr(native, "load", lambda name: native.Library(library, None))
    monkeypatch.setattr(native.installed, "record", lambda: record)
    monkeypatch.setattr(native, "_driver_cuda", lambda: 12080)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: capabilities[getattr(k, "index", k) or 0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: names[k])
    monkeypatch.setattr(availability, "_compiler_missing", lambda: None)
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(native, "_ANSWERS", {})
    return library


UNFIT = (
    "a first launch on cuda:1 (NVIDIA A10, compute capability 8.6) failed: no kernel image is available (209). "
    "_C_cuda is built with CUDA 13.0 for 90a-real, torch with CUDA"
)


def test_the_device_of_the_tensors_decides(two_gpus: Path) -> None:
    """Not the current one, and not another that is in the machine."""
    for device in ("cuda", "cuda:0"):
        assert chosen_on(device) == "cuda+triton"
    assert chosen_on("cuda:1") == "triton"
    assert available("triton", "cuda:1") is None and UNFIT in (available("cuda", "cuda:1") or "")
    assert "and NVIDIA's driver knows CUDA up to 12.8; build it on this machine" in (available("cuda", "cuda:1") or "")


def test_a_library_that_does_not_fit_is_said_once(two_gpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="impl is 'cuda', which is not available for loss on cuda: a first launch"):
        choose("cuda", "cuda:1")
    for _ in range(3):
        chosen_on("cuda:1")
    (record,) = caplog.records
    assert record.levelname == "WARNING" and UNFIT in record.message and "uses impl='triton'" in record.message


def test_env_shows_each_gpu_where_they_differ(two_gpus: Path) -> None:
    found = env._implementations("cuda:1")
    assert env._gpus() == ["cuda:0", "cuda:1"] and UNFIT in found["cuda"] and found["triton"] is None
    assert env._implementations("cuda:0")["cuda"] is None
    choices = env._choices()
    assert choices["loss on cuda:0"] == "cuda+triton" and choices["loss on cuda:1"].startswith("triton; not cuda+tri")


def test_nothing_is_launched_beside_a_capture(two_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert native.unfit_device(torch.device("cuda:1")) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert UNFIT in (native.unfit_device(torch.device("cuda:1")) or "")


def test_an_error_that_no_build_mends_is_said_alone_and_not_kept(two_gpus: Path) -> None:
    error = ctypes.c_int.in_dll(ctypes.CDLL(str(two_gpus)), "fails_with")
    error.value = 2  # the GPU's memory is full
    said = native.unfit_device(torch.device("cuda:1")) or ""
    assert said.endswith("failed: no kernel image is available (2)")
    error.value = 0
    assert native.unfit_device(torch.device("cuda:1")) is None


def test_a_gpu_that_cannot_be_opened(two_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "device", refuse)
    said = native.unfit_device(torch.device("cuda:1"))
    assert said == "cuda:1 cannot be used: CUDA error: all CUDA-capable devices are busy or unavailable"


def test_a_library_without_the_probe_is_older(two_gpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.c").write_text("int other;")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "other.so", tmp_path / "other.c"], check=True)
    monkeypatch.setattr(native, "load", lambda name: native.Library(tmp_path / "other.so", None))
    assert "other.so is older than this gcahng; run: " in (native.unfit_device(torch.device("cuda:0")) or "")


# -- Triton counts as available only where it can compile


def test_triton_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    availability._no_c_compiler.cache_clear()
    assert "there is no gcc or clang; install one, or set CC" in (available("triton", "cuda") or "")
    availability._no_c_compiler.cache_clear()


def test_triton_needs_a_folder_for_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    availability._no_cache_folder.cache_clear()
    assert "which cannot be written to; set TRITON_CACHE_DIR to a folder" in (available("triton", "cuda") or "")
    availability._no_cache_folder.cache_clear()


# -- GCAHNG_AUTO: what "auto" takes on CUDA where a measurement says otherwise


@pytest.fixture
def all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "available", lambda *_: None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cudnn", "GCAHNG_AUTO is cudnn; it must begin with one of cuda.triton, cuda, triton, torch"),
        ("reference", "it must begin with one of"),
        (
            "cuda,mixing=triton",
            "GCAHNG_AUTO is cuda,mixing=triton; .* each part must be OP=cuda or OP=triton, with OP one",
        ),
        ("cuda,mix_fwd_=cpp", "each part must be OP=cuda or OP=triton"),
        ("cuda,mix_fwd_", "each part must be OP=cuda or OP=triton"),
        ("torch,mix_fwd_=cuda", "after cuda.triton, cuda or triton each part"),
    ],
)
def test_mistakes_in_what_auto_is_asked_for(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCAHNG_AUTO", text)
    with pytest.raises(UserError, match=message):
        dispatch.auto_asks()


def test_what_is_asked_for_and_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "available", lambda impl, *_: "it is not built" if impl == "cuda" else None)
    monkeypatch.setenv("GCAHNG_AUTO", "triton,mix_fwd_=cuda")
    with pytest.raises(
        UserError, match="GCAHNG_AUTO is triton,mix_fwd_=cuda and cuda is not available on cuda: it is not"
    ):
        choose("auto", "cuda")


@pytest.mark.usefixtures("all_there")
def test_auto_follows_what_it_is_asked_for_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss() -> str:
        (line,) = (line for line in report().splitlines() if line.startswith("  loss on cuda "))
        return line

    assert choose("auto", "cuda").implementation == "cuda+triton"
    monkeypatch.setenv("GCAHNG_AUTO", "triton, mix_fwd_=cuda")
    assert choose("auto", "cuda").implementation == "triton,mix_fwd_=cuda"
    assert choose("cuda", "cuda").implementation == "cuda"
    assert choose("auto", "cpu").implementation == "cpp"
    assert loss().endswith("triton,mix_fwd_=cuda (as GCAHNG_AUTO asks)")
    monkeypatch.setenv("GCAHNG_AUTO", "")
    assert choose("auto", "cuda").implementation == "cuda+triton"
    monkeypatch.setenv("GCAHNG_AUTO", "cudnn")
    assert "none (GCAHNG_AUTO is cudnn; it must begin" in loss()


@pytest.mark.parametrize(
    ("implementation", "op", "namespace"),
    [
        ("cuda+triton,mix_fwd_=triton", "mix_fwd_", TRITON),
        ("cuda+triton,mix_fwd_=triton", "mix_bwd_z_", NATIVE),
        ("triton,mix_fwd_=cuda", "mix_fwd_", NATIVE),
        ("triton,mix_fwd_=cuda", "gate_fwd_", TRITON),
    ],
)
def test_ops_come_from_where_they_are_asked_for(implementation: str, op: str, namespace: str) -> None:
    assert ops_of(implementation).overload(op) is getattr(getattr(torch.ops, namespace), op).default


# -- the native library


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
