"""gcahng study on a few steps: killed in the middle and resumed, left alone where it is done, and its page."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import make_noise

import gcahng
from gcahng.cli import main

ROOT = Path(gcahng.__file__).parents[1]
TINY = """
base:
  {steps: 3, eval_every: 1, device: cpu, backbone.embedding_dim: 16, backbone.width: 4}
data:
  noise: {data.name: folder, data.root: tree, data.val_classes: 3, data.classes_per_batch: 4,
          data.image_size: 32, data.resize: 32, data.workers: 0}
methods:
  npair: {loss: npair}
  gca: {baseline: npair}
seeds: [0, 1]
"""
NAMES = [f"noise-{method}-seed{seed}" for seed in (0, 1) for method in ("npair", "gca")]


def make_study(folder: Path) -> None:
    """The study's file, and its images."""
    (folder / "tiny.yaml").write_text(TINY)
    make_noise(folder / "tree")


def command(folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "gcahng", "study", "tiny.yaml", "--out", "out", "--jobs", "1"]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        words,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None, path
        time.sleep(0.01)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A study that was killed in its second run and stopped in its third one; the output of the last two commands."""
    folder = tmp_path_factory.mktemp("study")
    make_study(folder)
    first = command(folder)
    wait_for(folder / "out" / "runs" / NAMES[1] / "checkpoints" / "last.pt", first)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    second = command(folder)
    wait_for(folder / "out" / "runs" / NAMES[2] / "checkpoints" / "last.pt", second)
    second.send_signal(signal.SIGTERM)
    stopped = second.communicate(timeout=200)[0]
    assert second.returncode == 130
    third = command(folder)
    last = third.communicate(timeout=400)[0]
    assert third.returncode == 0, last
    return folder / "out", stopped, last


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="runs outlive a killed study")
def test_goes_on_after_kills(killed: tuple[Path, str, str]) -> None:
    out, stopped, last = killed
    assert NAMES[0] not in stopped and f"{NAMES[1]}: goes on" in stopped
    assert "the study was stopped; the same command goes on from here" in stopped
    assert f"{NAMES[0]}:" not in last and f"{NAMES[1]}:" not in last and f"{NAMES[2]}: goes on" in last
    found = json.loads((out / "results.json").read_text())
    for run in found["runs"]:
        name = f"noise-{run['method']}-seed{run['seed']}"
        summary = json.loads((out / "runs" / name / "summary.json").read_text())
        assert run["values"] == {m: summary["best"]["val"][m] for m in ("map@r", "recall@1", "r_precision")}
        assert run["command"] == f"gcahng train --config out/options/{name}.yaml --out out/runs/{name}"
        assert run["config"]["seed"] == run["seed"] == summary["seed"]
    lines = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert len(lines) == 4 * 3 and {line["classes"] for line in lines} == {"validation"}
    assert len(found["comparisons"]) == 3 and found["comparisons"][0]["seeds"] == [0, 1]
    by = {(run["method"], run["seed"]): run["values"]["map@r"] for run in found["runs"]}
    wanted = (by["gca", 0] - by["npair", 0] + by["gca", 1] - by["npair", 1]) / 2
    assert found["comparisons"][0]["paired"]["difference"]["mean"] == pytest.approx(wanted)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="runs outlive a killed study")
def test_what_is_done_stays(
    killed: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = killed[0]
    monkeypatch.chdir(out.parent)
    before = (out / "results.json").read_text()
    assert main(["study", "tiny.yaml", "--out", "out", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("0 of 4 runs left\n")
    assert main(["study", "tiny.yaml", "--out", "out"]) == 0
    assert (out / "results.json").read_text() == before
    capsys.readouterr()
    changed = out.parent / "changed.yaml"
    changed.write_text(TINY.replace("steps: 3", "steps: 4"))
    assert main(["study", "changed.yaml", "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert "was made with another steps than methods.npair on data.noise" in err and err.count("\n") == 1


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="runs outlive a killed study")
def test_the_page_needs_no_other_file(killed: tuple[Path, str, str]) -> None:
    text = (killed[0] / "study.html").read_text()
    assert [*re.findall(r'<section id="(\w+)"', text)] == ["results", "differences", "negatives", "runs"]
    assert text.count("<figure") == 3 * 2 + 3 and "validation classes" in text  # metrics, differences; negatives
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)


@pytest.mark.browser
@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="runs outlive a killed study")
def test_the_page_in_a_browser(killed: tuple[Path, str, str], browser) -> None:
    for width in (1280, 390):
        page = browser.new_page(viewport={"width": width, "height": 800})
        errors: list[str] = []
        page.on("console", lambda message, errors=errors: errors.append(message.text))
        page.on(
            "request",
            lambda request, errors=errors: errors.append(request.url) if "study.html" not in request.url else 0,
        )
        page.goto((killed[0] / "study.html").resolve().as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for chart in page.locator("svg").all():
            box = chart.bounding_box()
            assert box["width"] > 200 and box["x"] + box["width"] <= width
            for text in chart.locator("text").all():
                inner = text.bounding_box()
                assert box["x"] <= inner["x"] and inner["x"] + inner["width"] <= box["x"] + box["width"]
        folder = os.environ.get("GCAHNG_SCREENSHOTS")
        if folder:
            page.screenshot(path=Path(folder) / f"study-{width}.png", full_page=True)
        page.close()
        assert [error for error in errors if not error.startswith("data:")] == []


def test_a_run_that_fails_is_counted_and_others_go_on(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "gcahng").mkdir()
    (tmp_path / "gcahng" / "__main__.py").write_text("print('no luck'); raise SystemExit(3)")
    make_study(tmp_path)
    monkeypatch.chdir(tmp_path)  # where the runs find the package that fails
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert main(["study", "tiny.yaml", "--out", "out"]) == 1
    out = capsys.readouterr().out
    assert out.count("failed (exit status 3); see out/logs/") == 4 and "4 failed" in out
    assert (tmp_path / "out" / "logs" / f"{NAMES[0]}.log").read_text() == "no luck\n"
    assert "0 of 4 runs have finished" in (tmp_path / "out" / "study.html").read_text()


def test_a_folder_of_others_is_left_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "out" / "runs" / NAMES[0]
    folder.mkdir(parents=True)
    (folder / "precious").touch()
    make_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["study", "tiny.yaml", "--out", "out"]) == 2
    assert "is there, and no study made it" in capsys.readouterr().err
    assert [*folder.iterdir()] == [folder / "precious"]


def test_data_that_is_not_there(tmp_path: Path, capsys) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.replace("data.root: tree", "data.root: nowhere"))
    assert main(["study", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "data.noise: data.root is nowhere, which does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
