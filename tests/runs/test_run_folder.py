"""What a run folder holds besides the checkpoint that a run continues from."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import differences, outcome
from stopped_runs import interrupted, lines_of

from gcahng.devices import deterministic
from gcahng.errors import UserError
from gcahng.runs.checkpoint import load_checkpoint
from gcahng.train import TrainConfig, fit, resume, session

MakeConfig = Callable[..., TrainConfig]
pytestmark = pytest.mark.usefixtures("without_pictures")


def test_last_is_written_last(config_of_whole: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """last.pt is written after the lines of the losses, the best checkpoint and those that are never replaced."""
    written = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            written.append(name or path.name)
            return real(path, *arguments, **options)

        return call

    monkeypatch.setattr(session, "save_checkpoint", noted("", session.save_checkpoint))
    monkeypatch.setattr(session, "save_model", noted("", session.save_model))
    monkeypatch.setattr(session.RunLog, "flush", noted("lines", session.RunLog.flush))
    fit(replace(config_of_whole, loss="npair", steps=4, eval_every=4))
    files_of = [[f"{which}.safetensors", f"{which}.pt"] for which in ("best", "step-4", "last")]
    assert written == ["lines", *sum(files_of, [])]


def test_weights_as_safetensors(whole: Path) -> None:
    from gcahng.models.model_file import load_model

    for which in ("last", "best", "step-4", "step-8"):
        state = load_checkpoint(whole / "checkpoints" / f"{which}.pt")
        model = load_model(whole / "checkpoints" / f"{which}.safetensors")
        assert model.step == state["step"] and model.data_digest == state["data_digest"]
        assert differences(state["model"], dict(model.network.state_dict())) == []
    assert not (whole / "checkpoints" / "step-6.pt").exists()


def test_epochs(small_config: MakeConfig, tmp_path: Path) -> None:
    """12 training classes of 12 images in batches of 12: an epoch has 12 steps."""
    config = small_config(epochs=2, eval_every_epochs=2, loss="npair", log_every=100, out=str(tmp_path / "run"))
    summary = fit(config)
    assert summary["steps"] == 24 and lines_of(tmp_path / "run", "val") == [24]
    kept = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["config"]
    assert (kept["steps"], kept["steps_per_epoch"], kept["eval_every"], kept["epochs"]) == (24, 12, 24, 2)


def test_system_lines(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    system = [line for line in lines if line["kind"] == "system"]
    assert [line["step"] for line in system] == [2, 3, 4, 6, 8]
    for line in system:
        assert line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1 and line["lr"] == 1e-3
        assert 50 < line["peak_memory_mib"] < 100_000


def test_deterministic_algorithms_for_a_while() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        with deterministic(False):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(False):
            pass
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"precision": "bf16"}, {"precision": "fp16"}, {"skip_nonfinite": 1}])
def test_on_cuda_with_deterministic(fields: dict[str, Any], small_config: MakeConfig, tmp_path: Path) -> None:
    fields = {**fields, "device": "cuda", "deterministic": True}
    fit(small_config(**fields, out=str(tmp_path / "whole")))
    run = interrupted(small_config(**fields, out=str(tmp_path / "run")), 3)
    resume(run)
    assert differences(outcome(tmp_path / "whole"), outcome(run)) == []


def test_seconds_add_up(config_of_whole: TrainConfig) -> None:
    run = interrupted(config_of_whole, 4)
    before = load_checkpoint(run / "checkpoints" / "last.pt")["seconds"]
    summary = resume(run)
    assert before["all"] > before["step"] > 0
    assert summary["seconds"] > before["all"] and summary["step_seconds"] > before["step"]
    assert summary["step_cpu_seconds"] > before["step_cpu"]


def test_weights_and_biases(config_of_whole: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gcahng.extras.find_spec", lambda name: None if name == "wandb" else True)
        with pytest.raises(UserError, match=r'wandb is not installed; pip install "gcahng\[wandb\]"'):
            fit(replace(config_of_whole, wandb="glyphs"))
    started: list[dict[str, Any]] = []
    sent: list[tuple[int, dict[str, float]]] = []
    ended: list[int] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            sent.append((step, values))

        def finish(self, exit_code: int) -> None:
            ended.append(exit_code)

    stub = types.ModuleType("wandb")
    stub.__spec__ = ModuleSpec("wandb", None)
    stub.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="online"))  # type: ignore[attr-defined]
    stub.Error, stub.login = OSError, lambda prompt=True: key  # type: ignore[attr-defined]
    key = False
    stub.init = lambda **options: (started.append(options), Run())[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    with pytest.raises(UserError, match="wandb is 'glyphs', and Weights & Biases has no key here; run `wandb login`"):
        fit(replace(config_of_whole, wandb="glyphs"))
    assert not Path(str(config_of_whole.out)).exists() and not started
    key = True
    run = interrupted(replace(config_of_whole, wandb="glyphs"), 4)
    resume(run)
    assert [options["project"] for options in started] == ["glyphs"] * 2 and ended == [1, 0]
    assert started[0]["id"] == started[1]["id"] and all(options["resume"] == "allow" for options in started)
    assert started[0]["config"]["steps"] == 8
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for (step, values), line in zip(sent, lines, strict=True):
        assert step == line.pop("step")
        kind = line.pop("kind")
        assert values == {f"{kind}/{name}": value for name, value in line.items() if not isinstance(value, list)}
