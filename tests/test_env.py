"""`gcahng env`: what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from gcahng import env, installed, native
from gcahng.availability import interpreter_fails
from gcahng.cli import main
from gcahng.extras import faiss_missing


def test_the_report_has_what_a_maintainer_asks_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GCAHNG_AUTO", "torch")
    monkeypatch.setenv("NCCL_SECRET_TOKEN", "do not show")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "do not show" not in text and "do not show" not in json.dumps(found)
    assert found["environment"]["GCAHNG_AUTO"] == "torch" and "GCAHNG_AUTO" in text
    for words in (sys.executable, str(installed.FOLDER), "processor", "CPUs", "C library", "faiss-gpu", "Notes"):
        assert words in text or words == "Notes" and not found["notes"]
    library = found["libraries"]["_C_cpu"]
    assert library["path"] == str(native.load("_C_cpu").path) and library["not loaded"] is None
    assert library["size"] == Path(library["path"]).stat().st_size and library["sha256"][:16] in text
    assert found["implementations"]["cpu"]["cpp"] is None
    assert set(found["auto"]) >= {"loss on cpu", "edge_update on cpu", "channel_mix on cpu"}


def test_the_build_and_a_change_since_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"sha256": "0" * 64, "compiler": "GNU 12.2.0", "flags": "-O3", "system": "Linux x86_64", "cmake": "3.30"}
    monkeypatch.setattr(installed, "record", lambda: {"_C_cpu": built})
    text = env.report()
    assert "GNU 12.2.0 on Linux x86_64, CMake 3.30: -O3" in text and ", not as built" in text


def test_a_library_that_does_not_load_is_reported_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda name: native.Library(None, f"{name}.so is cut off"))
    monkeypatch.setattr(native, "cpu_arch", lambda: None)
    text = env.report()
    assert "not loaded: _C_cpu.so is cut off" in text and "not loaded: _C_cuda.so is cut off" in text


def test_both_faiss_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.15" if "faiss" in name else version(name))
    (note,) = env.collect()["notes"]
    assert "faiss-cpu and faiss-gpu are both installed, into the same folder" in note


def test_faiss_after_the_other_was_removed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is left of the folder imports as an empty package, or fails to import."""
    assert faiss_missing() is None
    (tmp_path / "faiss" / "contrib").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not Path(p, "faiss").exists())])
    for name in [name for name in sys.modules if name.partition(".")[0] == "faiss"]:
        monkeypatch.delitem(sys.modules, name)
    words = "faiss is installed but does not work (module 'faiss' has no attribute 'IndexFlatL2')"
    assert words in (faiss_missing() or "")
    assert "pip uninstall -y faiss-cpu faiss-gpu, then install one" in (faiss_missing() or "")
    from gcahng.errors import UserError
    from gcahng.retrieval.candidates import choose_backend

    with pytest.raises(UserError, match='backend="faiss": faiss is installed but does not work'):
        choose_backend("faiss", env.torch.device("cpu"))
    assert choose_backend("auto", env.torch.device("cpu")) == "torch"
    monkeypatch.delitem(sys.modules, "faiss")
    (tmp_path / "faiss" / "__init__.py").write_text("from .loader import *\n")
    assert "does not work (No module named 'faiss.loader')" in (faiss_missing() or "")


@pytest.mark.parametrize(
    ("triton", "numpy", "fails"),
    [
        ("3.6.0", "2.4.0", True),
        ("3.6.0", "2.3.5", False),
        ("3.6.0", "1.26.4", False),
        ("3.7.0", "2.4.6", False),
        ("3.8.0+git", "2.10.0", False),
        ("3.5.1", "2.10.0", True),
    ],
)
def test_tritons_interpreter_is_refused_where_numpy_breaks_it(triton: str, numpy: str, fails: bool) -> None:
    reason = interpreter_fails(triton, numpy)
    assert (reason is not None) == fails
    if reason:
        assert "install triton >= 3.7, or numpy < 2.4" in reason
