"""gcahng train and gcahng eval: options, YAML, the lines they print, and one end-to-end run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import gcahng
from gcahng.cli import main
from gcahng.commands.train import _one_line, parse
from gcahng.config import config_to_dict
from gcahng.errors import UserNote
from gcahng.runs.checkpoint import load_checkpoint
from gcahng.train import DataConfig, GcaConfig, TrainConfig

ROOT = Path(gcahng.__file__).parents[1]
SMALL = "--steps 3 --eval_every 2 --device cpu --threads 1 --data.classes_per_batch 4 --backbone.width 4 "
SMALL += "--backbone.embedding_dim 16"


def test_no_options_are_the_defaults() -> None:
    assert parse([]) == TrainConfig()


def test_options_and_yaml(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("loss: npair\nsteps: 7\ndata:\n  max_shift: 1\ngca:\n  base: supcon\n")
    assert parse(["--config", str(file)]) == TrainConfig(
        loss="npair", steps=7, data=DataConfig(max_shift=1), gca=GcaConfig(base="supcon")
    )
    config = parse(["--config", str(file), "--steps", "8", "--gca.base=arcface", "--optimizer.proxy_lr", "0.3"])
    assert (config.loss, config.steps, config.gca.base, config.optimizer.proxy_lr) == ("npair", 8, "arcface", 0.3)
    assert parse(["--optimizer.lr", "1e-4"]).optimizer.lr == 1e-4


def test_a_runs_config_is_read_back(tmp_path: Path) -> None:
    config = TrainConfig(loss="arcface", out=str(tmp_path / "x"), threads=2, gca=GcaConfig(alpha=3.5))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps x", "steps: Expected an int. Got value: x"),
        ("--epochs x", "epochs: Expected an int or null. Got value: x"),
        ("--eval_every_epochs 2", "eval_every_epochs is 2 and epochs is null; give epochs, or eval_every in steps"),
        (
            "--loss triplet",
            "loss: Expected one of gca_hng, npair, proxy_anchor, supcon, arcface, multi_similarity, soft_triple, "
            "norm_softmax, proxy_synthesis. Got value: triplet",
        ),
        ("--config {tmp}/words.yaml", "config must be a YAML file of options; it holds: 'words'"),
        ("--gca.bass npair", "--gca.bass is not an option; did you mean --gca.base?"),
        ("--config {tmp}/no.yaml", "config is {tmp}/no.yaml, which does not exist"),
        ("--config {tmp}/unknown.yaml", "Group 'data' does not accept option 'rooot'"),
        ("--config {tmp}/type.yaml", "steps: Expected an int"),
        ("--config {tmp}/broken.yaml", ""),
        ("--config {tmp}/latin.yaml", "config {tmp}/latin.yaml has invalid UTF-8 at byte 4"),
        ("--config {tmp}/empty.yaml", "optimizer is null; it must hold its options, such as lr, or be left out"),
        ("--out {tmp}/full", "out is {tmp}/full, which is not empty"),
        ("--device tpu", "device is 'tpu'; it must be auto, cpu, cuda or cuda:N"),
        ("--steps 0", "steps is 0; it must be a whole number of at least 1"),
        ("--gca.heads 5 --data.classes_per_batch 4 --device cpu", "embedding_dim is 64 and heads is 5"),
        ("stray", "stray is not an option"),
    ],
)
def test_mistakes_are_one_line(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "unknown.yaml").write_text("data:\n  rooot: x\n")
    (tmp_path / "type.yaml").write_text("steps: many\n")
    (tmp_path / "words.yaml").write_text("words")
    (tmp_path / "broken.yaml").write_text("steps: [1,\n")
    (tmp_path / "latin.yaml").write_bytes(b"# gr\xfc\xdfe\nsteps: 3\n")
    (tmp_path / "empty.yaml").write_text("optimizer:\n#  lr: 0.1\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments.format(tmp=tmp_path).split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"gcahng: error: {message.format(tmp=tmp_path)}")
    assert err.count("\n") == 1 and err.endswith("\n")
    assert not (tmp_path / "runs").exists()


def test_train_ends_with_a_table_and_paths_that_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", *SMALL.split(), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads((out / "summary.json").read_text())
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["Recall@1"])
    assert "MAP@R" in lines[head] and "R-Precision" in lines[head]
    assert f"{100 * summary['test']['map@r']:.2f}" in lines[head + 1].split()
    paths = [line.strip() for line in lines if line.startswith("  ") and str(out) in line]
    assert len(paths) == 8 and all(Path(path).exists() for path in paths)


def test_eval_of_a_run_equals_its_summary(
    finished_run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, summary = finished_run
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads((run / "eval-last-test.json").read_text())["test"] == summary["test"]
    assert f"{100 * summary['test']['recall@1']:.2f}" in out and str(run / "eval-last-test.json") in out

    checkpoint = run / "checkpoints" / "best.pt"
    written = tmp_path / "best.json"
    assert main(["eval", str(checkpoint), "--split", "val", "--recall_at", "1", "5", "--json", str(written)]) == 0
    values = json.loads(written.read_text())["val"]
    assert values["map@r"] == summary["best"]["val"]["map@r"] and "recall@5" in values and "recall@2" not in values


def test_eval_options_of_the_metrics(
    finished_run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, summary = finished_run
    written = tmp_path / "eval.json"
    options = "--metrics recall precision map --recall_at 1 --precision_at 3 --map_at 5 --per_class --clustering"
    assert main(["eval", str(run), "--device", "cpu", *options.split(), "--json", str(written)]) == 0
    assert re.search("Recall@1 +Precision@3 +MAP@5 +NMI +AMI\n", capsys.readouterr().out)
    result = json.loads(written.read_text())
    assert result["test"]["recall@1"] == summary["test"]["recall@1"] and 0 < result["test"]["nmi"] <= 1
    queries = sum(values["queries"] for values in result["per_class"].values())
    assert queries == result["test"]["queries"] and len(result["per_class"]) == result["test"]["clusters"]
    assert main(["eval", str(run), "--device", "cpu", "--protocol", "official", "--json", str(written)]) == 0
    assert json.loads(written.read_text())["test"].keys() == summary["test"].keys()
    for mistake, message in [
        (["--protocol", "paper"], "protocol is 'paper'; it must be one of exact, official"),
        (["--ties", "none"], "ties is 'none'; it must be one of index, expected, optimistic, pessimistic"),
        (
            ["--metrics", "f1"],
            "metrics is ('f1',); it must be one or more of recall, precision, map, map@r, r_precision",
        ),
    ]:
        capsys.readouterr()
        assert main(["eval", str(run), "--device", "cpu", *mistake]) == 2
        assert capsys.readouterr().err == f"gcahng: error: {message}\n"


def test_eval_says_when_the_images_differ(
    finished_run: tuple[Path, dict[str, Any]],
    small_data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dataclasses import replace

    other = replace(small_data, digest="0" * 16)
    monkeypatch.setattr("gcahng.evaluation.evaluate.load_data", lambda config: other)
    with pytest.warns(UserNote, match="^these images differ from those of the training run"):
        assert main(["eval", str(finished_run[0]), "--json", str(tmp_path / "x.json")]) == 0


def test_eval_of_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pt").write_text("no checkpoint")
    assert main(["eval", str(tmp_path / "x.pt")]) == 2
    assert capsys.readouterr().err.startswith(f"gcahng: error: {tmp_path}/x.pt is no checkpoint or is damaged")
    assert main(["eval", str(tmp_path)]) == 2
    assert "holds no checkpoints/last.pt" in capsys.readouterr().err


def test_the_bar_shows_losses_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal (a pseudo-terminal here) training shows rich's bar."""
    import io

    from rich.console import Console

    from gcahng.train.terminal import Bar

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140)
    monkeypatch.setattr("rich.get_console", lambda: console)
    monkeypatch.setattr("rich.progress.get_console", lambda: console)
    bar = Bar()
    bar.start("a title", 10)
    bar.losses(5, {"loss": 1.5, "J_m": 0.25, "J_syn": 0.125, "J_gce": 9.0})
    bar.evaluation(5, "val", {"recall@1": 0.5, "map@r": 0.25})
    bar.close()
    shown = screen.getvalue()
    assert "a title" in shown and "validation R@1 50.00  MAP@R 25.00" in shown
    assert "loss 1.500  J_m 0.250  J_syn 0.125" in shown and "left" in shown and "5/10" in shown


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_bar_keeps_the_count_and_the_times(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from gcahng.train.terminal import Bar

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr("rich.get_console", lambda: console)
    monkeypatch.setattr("rich.progress.get_console", lambda: console)
    bar = Bar()
    bar.start("a title", 2000)
    bar.losses(1005, {"loss": 7.615, "J_m": 2.167, "J_syn": 0.0, "J_gen": 60.219})
    bar.close()
    last = screen.getvalue().rsplit("train", 1)[1]
    assert "1005/2000 loss 7.615 0:00:00 left " in last and "…" not in last


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gcahng", "train", *SMALL.split(), "--steps", "100000", "--eval_every", "20"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 20/"):
            break
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.startswith("gcahng: interrupted after step ") and err.count("\n") == 1
    assert err.endswith(f"to continue: gcahng train --resume {tmp_path / 'run'}\n")


@pytest.mark.slow
def test_sigkill_and_resume_on_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gcahng", "train"]
    options = [*SMALL.split(), "--steps", "60", "--eval_every", "20"]
    subprocess.run([*command, *options, "--out", str(tmp_path / "whole")], cwd=ROOT, check=True)
    process = subprocess.Popen([*command, *options, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"step 40/"):
            break
    process.kill()
    process.communicate()
    subprocess.run([*command, "--resume", str(tmp_path / "run")], cwd=ROOT, check=True)
    found = [load_checkpoint(tmp_path / run / "checkpoints" / "last.pt") for run in ("whole", "run")]
    assert found[1]["resumed"] == 1 and found[0]["step"] == found[1]["step"] == 60
    assert all(torch.equal(found[0]["model"][name], value) for name, value in found[1]["model"].items())


@pytest.mark.slow
def test_the_default_run_learns_unseen_classes(tmp_path: Path) -> None:
    """The README's command runs to its end, within the time and with the quality that the README promises."""
    out = tmp_path / "run"
    subprocess.run([sys.executable, "-m", "gcahng", "train", "--out", str(out)], cwd=ROOT, check=True, timeout=1800)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2000 and summary["seconds"] < 480
    assert summary["test"]["recall@1"] >= 0.90 and summary["test"]["map@r"] >= 0.66
    assert main(["eval", str(out)]) == 0
    assert json.loads((out / "eval-last-test.json").read_text())["test"] == summary["test"]


def test_recipes_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is a file; anything that cannot be a path is looked up in gcahng.recipes."""
    import types

    (tmp_path / "a_recipe.yaml").write_text("steps: 7\n")
    asked = []
    recipes = types.ModuleType("gcahng.recipes")
    recipes.find = lambda name: (asked.append(name), tmp_path / "a_recipe.yaml")[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gcahng.recipes", recipes)
    monkeypatch.chdir(tmp_path)
    assert parse(["--config", "a_recipe"]).steps == parse(["--config=a_recipe"]).steps == 7
    assert parse(["--config", "a_recipe", "--steps", "9"]).steps == 9
    assert asked == ["a_recipe"] * 3
    assert parse(["--config", "a_recipe.yaml"]).steps == parse(["--config", f"{tmp_path}/a_recipe.yaml"]).steps == 7
    (tmp_path / "plain").write_text("steps: 8\n")
    assert parse(["--config", "plain"]).steps == 8
    assert asked == ["a_recipe"] * 3


def test_the_order_of_an_options_types_is_not_in_its_message() -> None:
    """It is the one in which the process first saw them, as typing caches unions."""
    for types in ("int, NoneType", "NoneType, int"):
        said = f'Parser key "epochs":\n  Does not validate against any of the Union subtypes\n  Subtypes: [{types}]\n'
        message = _one_line(f"{said}  Errors:\n    - Expected a NoneType\n  Given value: x", ArgumentParser())
        assert message == "epochs: Expected an int or null. Got value: x; see gcahng train --help"
