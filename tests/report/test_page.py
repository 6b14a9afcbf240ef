"""The page as a whole: its parts, its numbers, nothing from outside, nothing that a name could smuggle in."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from gcahng.cli import main
from gcahng.data import DataSplits
from gcahng.errors import UserError
from gcahng.report import write_report

PARTS = ("results", "curves", "negatives", "queries", "confused", "map", "options")
VOID = {"meta", "link", "img", "br", "rect", "path", "circle", "polygon"}


class Page(HTMLParser):
    """Elements with attributes and text, of a page whose every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif not (self._open and self._open[-1] == "style"):
            self.texts.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and all(a.get(name) == value for name, value in wanted.items())]

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def write(runs, tmp_path: Path, **options) -> tuple[Page, str]:
    out = write_report(
        runs.run, tmp_path / "page.html", **{"map_method": "pca", "queries": 3, "device": "cpu"} | options
    )
    text = out.read_text(encoding="utf-8")
    return Page(text), text


def test_its_parts_and_numbers(runs, tmp_path: Path) -> None:
    page, text = write(runs, tmp_path, baselines=[runs.baseline])
    assert [a["id"] for a in page.all("section")] == list(PARTS)
    assert [a["href"] for a in page.all("a")] == [f"#{part}" for part in PARTS]
    summary, other = (json.loads((run / "summary.json").read_text()) for run in (runs.run, runs.baseline))
    for name in ("recall@1", "recall@2", "recall@4", "recall@8", "map@r", "r_precision"):
        for values in (summary, other):
            assert f"{100 * values['test'][name]:.2f}" in page.text
    for title in (
        "MAP@R",
        "Recall@1",
        "Recall@K",
        "Loss",
        "Distance to the anchor",
        "Hardest negative",
        "θ over training",
    ):
        assert title in page.texts, title
    labels = [a["aria-label"].split()[0] for a in page.all("svg")]
    for loss in ("J_m", "J_syn", "J_gce", "J_gen", "J_soft", "J_sim", "J_div", "J_cls"):
        assert loss in labels
    assert len(page.all("div", **{"class": "query"})) == 3 * 3
    assert len(page.all("li", **{"class": "item right"})) + len(page.all("li", **{"class": "item wrong"})) == 9 * 8
    assert len(page.all("circle", r="5")) == len(runs.data.test)
    assert page.all("div", **{"class": "pair"})
    assert "No baseline runs" not in page.text and "steps_per_epoch: 3" in page.text
    assert len(text) < 5e6


def test_nothing_comes_from_outside(runs, tmp_path: Path) -> None:
    page, text = write(runs, tmp_path)
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data", "action"):
                assert value.startswith(("data:", "#"))
    assert all(link.startswith("data:image/webp;base64,") for link in re.findall(r"url\(([^)]*)\)", text))
    assert not re.findall(r"https?:|//[a-z]+\.", text) and "@import" not in text
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    _, script = page.scripts
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'") and policy.count("script-src") == 1


def test_names_are_text(runs, tmp_path: Path) -> None:
    page, text = write(runs, tmp_path, baselines=[runs.baseline])
    data, script = page.scripts
    assert page.all("script") == [{"type": "application/json", "id": "map-data"}, {}]
    assert not page.all("b", onload="") and "<script>alert" not in text
    known = json.loads(data)
    assert known["classes"] == list(runs.data.test.class_names)  # whole, with what looks like markup
    assert "<" not in data
    shown = page.text
    for name in runs.data.test.class_names[:2]:
        assert name in shown
    assert str(runs.run) in shown and "base'line" in shown
    assert page.all("title") and "b" not in {tag for tag, a in page.elements if a.get("onload")}
    names = {a["alt"] for a in page.all("img")}
    assert any("<script>alert(1)</script> (image " in name for name in names)
    assert all(a.get("alt") for a in page.all("img"))


def test_files_and_a_gallery(runs, file_data: DataSplits, see: Callable[[DataSplits], None], tmp_path: Path) -> None:
    see(file_data)
    page, text = write(runs, tmp_path)
    assert "15 images are searched" in page.text and "Queries with nothing right to find, left out: 1." in page.text
    assert "Recall@3" in page.text and "Recall@2" in page.text  # of this page, and of the run's own validation
    assert "These images differ from" not in page.text  # the digest is the same
    queries = {a["alt"] for a in page.all("img")}
    assert all(path in queries for path in file_data.test.paths[:3])
    assert "<i>&" not in text and json.loads(page.scripts[0])["names"] == list(file_data.test.paths)
    assert len(page.all("circle", r="5")) == 6
    see(replace(file_data, digest="1" * 16))
    assert "These images differ from those of the training run." in write(runs, tmp_path)[0].text


def test_names_that_are_no_utf8(runs, see: Callable[[DataSplits], None], tmp_path: Path) -> None:
    names = ("cl\udce4ss", *runs.data.test.class_names[1:])
    see(replace(runs.data, test=replace(runs.data.test, class_names=names)))
    out = write_report(runs.run, tmp_path / "page.html", map_method="pca", queries=9, device="cpu")
    assert b"cl\xe4ss" in out.read_bytes()  # which a browser shows as a replacement character


def test_the_threads_are_those_of_eval(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the run leaves them to PyTorch, so does the report: with others, sums round otherwise."""
    from gcahng.report import contents

    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(contents, "torch_threads", lambda count: seen.append(count) or nullcontext())
    load = contents.load_model
    free = lambda model: replace(model, config=replace(model.config, threads=None))  # noqa: E731
    monkeypatch.setattr(contents, "load_model", lambda *given: free(load(*given)))
    write(runs, tmp_path)
    assert seen == [2]


def test_parts_without_data_say_why(runs, tmp_path: Path) -> None:
    baseline = replace(runs, run=runs.baseline)
    page, _ = write(baseline, tmp_path)
    assert "The loss npair generates no negatives." in page.text and "No baseline runs" in page.text

    page, _ = write(replace(runs, run=runs.run / "checkpoints" / "last.pt"), tmp_path)
    assert "Nothing was recorded" in page.text and "did not record its negatives" in page.text

    older = tmp_path / "older"
    shutil.copytree(runs.run, older)
    lines = (older / "metrics.jsonl").read_text().splitlines(keepends=True)
    (older / "metrics.jsonl").write_text("".join(line for line in lines if '"negatives"' not in line))
    page, _ = write(replace(runs, run=older), tmp_path)
    assert "did not record its negatives" in page.text and "J" in page.texts


def test_a_baseline_that_never_ended_is_evaluated(runs, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(runs.baseline, broken)
    (broken / "summary.json").unlink()
    with_summary, without = (write(runs, tmp_path, baselines=[path])[0].texts for path in (runs.baseline, broken))
    numbers = [[text for text in texts if re.fullmatch(r"\d+\.\d\d", text)] for texts in (with_summary, without)]
    summary = json.loads((runs.baseline / "summary.json").read_text())
    assert numbers[0] == numbers[1] and f"{100 * summary['test']['map@r']:.2f}" in numbers[0]
    best = write(runs, tmp_path, baselines=[runs.baseline], which="best")[0]
    assert "checkpoints/best.pt" in best.text


def test_other_data_is_told(runs, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs.baseline, other)
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps(summary | {"data_digest": "f" * 16}))
    assert "trained on other data" in write(runs, tmp_path, baselines=[other])[0].text
    assert "trained on other data" not in write(runs, tmp_path, baselines=[runs.baseline])[0].text
    (other / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json cannot be read"):
        write(runs, tmp_path, baselines=[other])


def test_what_a_baseline_says_of_itself_is_text(runs, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs.baseline, other)
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps(summary | {"loss": "<u onload=alert(5)>npair"}))
    page, _ = write(runs, tmp_path, baselines=[other])
    assert "<u onload=alert(5)>npair" in page.text and not page.all("u")


def test_the_same_seed_is_the_same_page(runs, tmp_path: Path) -> None:
    first, second, other = (write(runs, tmp_path, seed=seed)[1] for seed in (1, 1, 2))
    assert first == second != other


def test_paths_may_be_strings(runs, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    written = write_report(
        str(runs.run), str(out), baselines=[str(runs.baseline)], queries=1, map_method="pca", device="cpu"
    )
    assert written == out and out.is_file()


def test_the_command(runs, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", str(runs.run), "--baseline", str(runs.baseline), "--map", "pca", "--queries", "1"]
    assert main([*arguments, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "embedding 45 test images of" in out and f"written {runs.run}/report.html" in out
    (runs.run / "report.html").unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{run} --queries 0", "queries is 0; it must be a whole number of at least 1"),
        ("{run} --seed -1", "seed is -1; it must be a whole number of at least 0 and at most 2^32 - 1"),
        ("{run} --out {tmp}", "out is {tmp}, a folder; it must be a file"),
        ("{run} --map tsne", "argument --map: invalid choice"),
        ("{run} --out {tmp}/file/x.html", "out is {tmp}/file/x.html; {tmp}/file is a file, not a folder"),
        ("{tmp}/none", "{tmp}/none does not exist"),
        ("{tmp}", "{tmp} holds no checkpoints/last.pt"),
        ("{run} --baseline {tmp}/none", "{tmp}/none does not exist"),
    ],
)
def test_mistakes_are_one_line(
    runs, tmp_path: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [part.format(run=runs.run, tmp=tmp_path) for part in arguments.split()]
    given += [] if "--out" in given else ["--out", str(tmp_path / "x.html")]
    given += [] if "--map" in given else ["--map", "pca"]
    (tmp_path / "file").touch()
    assert main(["report", *given]) == 2
    err = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_full_disk_leaves_the_old_page(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "page.html"
    out.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write(runs, tmp_path)
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_images_that_have_moved_and_progress(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots, heard = [], []
    monkeypatch.setattr("gcahng.evaluation.embed.EVAL_BATCH", 20)
    monkeypatch.setattr("gcahng.report.contents.load_data", lambda config: (roots.append(config.root), runs.data)[1])
    whole = write(runs, tmp_path)[1]
    parts = write(runs, tmp_path, data_root=Path("/elsewhere"), progress=lambda *places: heard.append(places))[1]
    assert roots == [None, "/elsewhere"] and heard == [(20, 45), (40, 45), (45, 45)] and parts == whole
