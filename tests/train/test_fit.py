"""A run from config to folder: what it writes, what it never overwrites, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gcahng.config import config_from_dict
from gcahng.data import DataSplits, ImageSet, Preprocessing
from gcahng.errors import UserError
from gcahng.evaluation import evaluate
from gcahng.evaluation.evaluate import evaluate_checkpoint
from gcahng.runs.checkpoint import SCHEMA, load_checkpoint
from gcahng.train import DataConfig, TrainConfig, TrainingInterrupted, fit, split_metrics
from gcahng.train.signals import StopSignals
from gcahng.train.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
FinishedRun = tuple[Path, dict[str, Any]]


def test_the_run_folder(finished_run: FinishedRun) -> None:
    run, _ = finished_run
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
        "checkpoints",
        "curves.png",
        "retrieval.png",
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "last.pt",
        "previous.pt",
        "best.pt",
        "last.safetensors",
        "best.safetensors",
    }
    assert not [path for path in run.rglob("*.tmp")]
    for picture in ("curves.png", "retrieval.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


def test_the_summary(finished_run: FinishedRun) -> None:
    run, returned = finished_run
    summary = json.loads((run / "summary.json").read_text())
    assert returned == {**summary, "out": str(run)}
    assert {"recall@1", "recall@2", "map@r", "r_precision"} <= set(summary["test"])
    assert all(0 <= summary["test"][name] <= 1 for name in ("recall@1", "recall@2", "map@r", "r_precision"))
    assert summary["test"]["queries"] == 40 * 12
    assert summary["steps"] == 6
    assert 0 < summary["step_seconds"] < summary["seconds"] and summary["step_cpu_seconds"] > 0
    assert summary["versions"]["torch"] == torch.__version__


def test_the_config_holds_every_option_and_can_be_used_again(
    finished_run: FinishedRun, small_config: MakeConfig
) -> None:
    run, _ = finished_run
    text = (run / "config.yaml").read_text()
    assert text.startswith("# Made with gcahng ") and torch.__version__ in text.splitlines()[0]
    assert config_from_dict(yaml.safe_load(text)) == small_config(out=str(run))


def test_metrics_lines(finished_run: FinishedRun) -> None:
    run, summary = finished_run
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6]
    assert [line["step"] for line in lines if line["kind"] == "val"] == [4, 6]
    train = next(line for line in lines if line["kind"] == "train")
    assert {"loss", "J_m", "J_syn", "J_gce", "J_cls", "J_soft", "J_sim", "J_div", "J_gen"} <= set(train)
    last = [line for line in lines if line["kind"] == "val"][-1]
    assert {"recall@1", "map@r"} <= set(last)
    assert {name: last[name] for name in summary["val"]} == summary["val"]
    negatives = [line for line in lines if line["kind"] == "negatives"]
    assert [line["step"] for line in negatives] == [4, 6]
    assert {"synthetic", "real", "theta_histogram"} <= set(negatives[-1])


def test_train_lines_are_means_since_the_line_before(
    finished_run: FinishedRun, small_config: MakeConfig, small_data: DataSplits
) -> None:
    run, _ = finished_run
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    written = [line["J_m"] for line in lines if line["kind"] == "train"]
    with torch.random.fork_rng():
        torch.set_num_threads(1)
        trainer = Trainer(small_config(), small_data)
        seen = [trainer.train_step()["J_m"].item() for _ in range(6)]
    assert written == pytest.approx([(seen[i] + seen[i + 1]) / 2 for i in (0, 2, 4)], rel=1e-12)


def test_tensorboard_events(finished_run: FinishedRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, summary = finished_run
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/J_gen", "val/map@r"} <= set(events.Tags()["scalars"])
    values = [(event.step, event.value) for event in events.Scalars("val/map@r")]
    assert [step for step, _ in values] == [4, 6]
    assert values[-1][1] == pytest.approx(summary["val"]["map@r"])


def test_checkpoints(finished_run: FinishedRun) -> None:
    run, summary = finished_run
    last = load_checkpoint(run / "checkpoints" / "last.pt")
    assert last["schema"] == SCHEMA and last["step"] == 6 and last["best"] == summary["best"]
    best = load_checkpoint(run / "checkpoints" / "best.pt")
    assert best["step"] == summary["best"]["step"]
    assert best["best"]["val"]["map@r"] >= summary["val"]["map@r"]


def test_evaluating_the_run_equals_the_summary(finished_run: FinishedRun) -> None:
    run, summary = finished_run
    result = evaluate_checkpoint(run)
    assert result["test"] == summary["test"]
    assert result["same_data"] and result["steps"] == 6
    assert evaluate_checkpoint(run, split="val")["val"] == summary["val"]
    assert evaluate_checkpoint(run, which="best", split="val")["val"] == summary["best"]["val"]


def test_a_run_measures_images_as_its_options_prepare_them(
    small_data: DataSplits, small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def embedded(
        processes: object,
        model: object,
        images: ImageSet,
        device: object,
        preprocessing: Preprocessing,
        workers: int,
    ) -> object:
        seen.append((len(images), preprocessing, workers))
        return torch.eye(len(images))

    monkeypatch.setattr(split_metrics, "embed_shared", embedded)
    data = replace(small_data, gallery=small_data.test)
    config = small_config(data=DataConfig(resize=40, image_size=30, workers=3))
    for split in ("val", "test"):
        split_metrics.measure(torch.nn.Identity(), data, split, config, torch.device("cpu"))
    as_asked = (Preprocessing(40, 30), 3)
    assert seen == [(len(small_data.val), *as_asked), (480, *as_asked), (480, *as_asked)]


def test_an_evaluation_has_the_threads_of_its_run(finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same number of threads sums are rounded alike."""
    run, _ = finished_run
    seen = []
    real = evaluate.embed_shared
    monkeypatch.setattr(evaluate, "embed_shared", lambda *given: seen.append(torch.get_num_threads()) or real(*given))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        evaluate_checkpoint(run)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


@pytest.mark.usefixtures("without_pictures")
def test_the_same_seed_gives_the_same_run(finished_run: FinishedRun, small_config: MakeConfig, tmp_path: Path) -> None:
    run, summary = finished_run
    torch.manual_seed(4321)
    generator = torch.get_rng_state()
    again = fit(small_config(out=str(tmp_path / "again")))
    assert torch.equal(torch.get_rng_state(), generator)  # the caller's generator is left alone
    assert again["test"] == summary["test"] and again["best"] == summary["best"]
    states = [load_checkpoint(path / "checkpoints" / "last.pt")["model"] for path in (run, tmp_path / "again")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_is_never_overwritten(finished_run: FinishedRun, small_config: MakeConfig) -> None:
    run, _ = finished_run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(UserError, match="not empty; a run is never overwritten"):
        fit(small_config(out=str(run)))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("val", "no class of the validation images has a second image"),
        ("test", "no class of the test images has a second image"),
        ("gallery", "no class of the test images has an image in the gallery"),
    ],
)
def test_nothing_to_find_is_said_before_training(
    split: str,
    message: str,
    small_data: DataSplits,
    small_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if split == "gallery":
        absent = small_data.test.labels.max() + 1
        searched = replace(small_data.test, labels=torch.full_like(small_data.test.labels, absent))
        data = replace(small_data, gallery=searched)
    else:
        images = getattr(small_data, split)
        first = torch.stack([(images.labels == c).nonzero()[0, 0] for c in images.labels.unique()])
        data = replace(small_data, **{split: images.subset(first)})
    monkeypatch.setattr("gcahng.train.loop.load_data", lambda _: data)
    with pytest.raises(UserError, match=message):
        fit(small_config(out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_out_must_be_a_folder_that_can_be_made(small_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file; it must be a folder"):
        fit(small_config(out=str(tmp_path / "file")))
    with pytest.raises(UserError, match="is a file, not a folder"):
        fit(small_config(out=str(tmp_path / "file" / "below")))


def test_default_folders_do_not_collide(small_config: MakeConfig, tmp_path: Path, monkeypatch: Any) -> None:
    from gcahng.runs.run_folder import make_run_folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260102-030405")
    made = [str(make_run_folder(small_config())) for _ in range(3)]
    stem = os.path.join("runs", "glyphs-gca_hng-20260102-030405")
    assert made == [stem, f"{stem}-2", f"{stem}-3"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(
    number: signal.Signals, small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.train_step

    def step_then_signal(self: Trainer) -> dict[str, torch.Tensor]:
        logs = real(self)
        if self.step == 3:
            os.kill(os.getpid(), number)
        return logs

    monkeypatch.setattr(Trainer, "train_step", step_then_signal)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TrainingInterrupted, match="interrupted after step 3 of 6; .*last.pt") as caught:
        fit(small_config(out=str(tmp_path / "run")))
    assert caught.value.exit_code == 128 + number
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 3
    assert not (tmp_path / "run" / "summary.json").exists()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_is_not_only_noted(second: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second signal does not wait for the end of the step; the same one within milliseconds is the first one."""
    ended: list[int] = []
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs without
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # as torchrun passes it on
            assert signals.received == signal.SIGINT and ended == []
            if second == signal.SIGINT:
                monkeypatch.setattr("gcahng.train.signals.ECHO", 0.0)
            if second == signal.SIGINT:
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), second)
            else:
                os.kill(os.getpid(), second)
                assert ended == [signal.SIGTERM]
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


@pytest.mark.usefixtures("without_pictures")
def test_verbose_lines(small_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(small_config(out=str(tmp_path / "run"), loss="npair"), verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("npair on glyphs, 12 classes; 6 steps of 4 x 3 on cpu")
    assert lines[1].startswith("step 4/6") and "J_m" in lines[1] and "MAP@R" in lines[1]
    assert lines[2].startswith("step 6/6")
    assert len(lines) == 4  # quiet: the title, a line an evaluation, and the test
    assert not any("\r" in line or "\x1b" in line for line in lines)


@pytest.mark.usefixtures("without_pictures")
def test_silent_by_default(small_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(small_config(out=str(tmp_path / "run"), loss="supcon", steps=1))
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("without_pictures")
def test_a_notebook_sees_progress(
    small_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without being asked, and in plain text: one line is written again and again, those of evaluations stay."""
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = type("ZMQInteractiveShell", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    fit(small_config(out=str(tmp_path / "run"), loss="npair"))
    out, err = capsys.readouterr()
    assert err == ""
    shown = [line.split("\r")[-1] for line in out.split("\n")]
    assert [line[:8] for line in shown[:3]] == ["npair on", "step 4/6", "step 6/6"]
    assert shown[3:] == ["evaluating on the test classes", ""] and "MAP@R" in shown[1]
    passing = [text.strip() for line in out.split("\n") for text in line.split("\r")[:-1] if text.strip()]
    assert [text.split("  ")[0] for text in passing] == ["step 2/6", "step 4/6", "step 6/6"]
    assert "loss" in passing[0] and passing[1].endswith("s left") and passing[2].endswith("0 s left")
    fit(small_config(out=str(tmp_path / "silent"), loss="npair", steps=1), verbose=False)
    assert capsys.readouterr() == ("", "")
    ipython.get_ipython = type("TerminalInteractiveShell", (), {})  # type: ignore[attr-defined]
    fit(small_config(out=str(tmp_path / "terminal"), loss="npair", steps=1))
    assert capsys.readouterr() == ("", "")
