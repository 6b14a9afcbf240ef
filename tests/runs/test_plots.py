"""Curves and retrieval grids: what is drawn, errors, and how the files are written."""

import json
import math
import os
import subprocess
import sys

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import torch

from gcahng.errors import UserError
from gcahng.runs import plots
from gcahng.runs.plots import plot_curves, plot_retrieval_grid
from gcahng.runs.records import running_mean

GREEN, RED = (0, 158, 115), (213, 94, 0)


def write_records(path, losses=("loss", "J_m"), metrics=("recall@1", "map@r"), steps=range(10, 210, 10)):
    with path.open("w") as file:
        for step in steps:
            print(json.dumps({"step": step, "kind": "train", "lr": 1e-3} | {n: 1 / step for n in losses}), file=file)
            if step % 50 == 0 and metrics:
                print(json.dumps({"step": step, "kind": "val"} | {n: step / 1000 for n in metrics}), file=file)
    return path


def pixels(path):
    """(H, W, 3) of 0..255."""
    return (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)


def drawn(monkeypatch):
    """The figures that are saved from now on."""
    figures = []
    save = plots.save_png
    monkeypatch.setattr(plots, "save_png", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def test_a_panel_for_the_metrics_and_for_each_loss(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    names = ("loss", "J_m", "J_syn", "J_gce", "J_cls", "J_soft", "J_sim", "J_div", "J_gen")
    log = write_records(tmp_path / "metrics.jsonl", names, ("recall@10", "recall@2", "map@r", "r_precision", "queries"))
    plot_curves(log, tmp_path / "curves.png")
    axes = figures[0].axes
    assert len(axes) == 10
    assert [line.get_label() for line in axes[0].lines] == [
        "MAP@R  20.0",
        "R-Precision  20.0",
        "Recall@2  20.0",
        "Recall@10  20.0",
    ]
    assert axes[0].lines[0].get_xydata().tolist() == [[step, step / 10] for step in (50, 100, 150, 200)]
    assert axes[1].get_title(loc="left") == "Loss"
    assert axes[1].lines[0].get_xydata().tolist() == [[step, 1 / step] for step in range(10, 210, 10)]
    assert all(ax.get_xlabel() == "step" for ax in axes)
    assert pixels(tmp_path / "curves.png").shape[0] > 300


@pytest.mark.parametrize("losses", [(), ("loss",), ("loss", "J_m"), ("loss", "J_m", "J_syn")])
@pytest.mark.parametrize("metrics", [(), ("map@r",)])
def test_any_number_of_panels(tmp_path, monkeypatch, losses, metrics):
    figures = drawn(monkeypatch)
    plot_curves(write_records(tmp_path / "metrics.jsonl", losses, metrics), tmp_path / "curves.png")
    assert len(figures[0].axes) == len(losses) + len(metrics)
    nothing = [text.get_text() for text in figures[0].texts if text.get_text() == "Nothing was recorded."]
    assert len(nothing) == (not losses and not metrics)


def test_running_mean():
    assert running_mean([1, 2, 6, math.nan, 4], 3) == [1, 1.5, 3, 4, 5]
    assert math.isnan(running_mean([math.inf], 1)[0])


def test_an_interrupted_log(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    log = write_records(tmp_path / "metrics.jsonl", steps=range(10, 40, 10))
    with log.open("a") as file:
        # Went on from step 10: 20 is recorded anew; then killed while it wrote 30.
        file.write('{"step": 20, "kind": "train", "loss": 7.0, "J_m": NaN}\n{"step": 30, "kind": "tr')
    plot_curves(log, tmp_path / "curves.png")
    loss, j_m = (ax.lines[0].get_xydata() for ax in figures[0].axes)
    assert loss.tolist() == [[10, 1 / 10], [20, 7.0], [30, 1 / 30]]
    assert math.isnan(j_m[1, 1])


@pytest.mark.parametrize("line", ["oops", "[1, 2]", '{"kind": "train", "loss": 1.0}', '{"step": 1, "loss": 1.0}'])
def test_a_log_of_something_else(tmp_path, line):
    log = write_records(tmp_path / "metrics.jsonl")
    log.write_text(line + "\n" + log.read_text())
    with pytest.raises(UserError, match="metrics_jsonl is .* line 1 is no record; it must be an object") as error:
        plot_curves(log, tmp_path / "curves.png")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "curves.png").exists()


def test_no_log(tmp_path):
    with pytest.raises(UserError, match=r"metrics_jsonl is .*none\.jsonl, which cannot be read"):
        plot_curves(tmp_path / "none.jsonl", tmp_path / "curves.png")


def clusters(classes=6, size=5, seed=0):
    """Embeddings whose neighbors are right but for the last sample of each class, which lies in the next class."""
    labels = torch.arange(classes).repeat_interleave(size)
    center = torch.where(torch.arange(len(labels)) % size == size - 1, (labels + 1) % classes, labels)
    noise = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(seed))
    return labels, torch.eye(classes)[center] + 0.01 * noise


@pytest.mark.parametrize("shape", [(16, 16), (1, 16, 16), (3, 20, 12)])
def test_frames_tell_right_from_wrong(tmp_path, monkeypatch, shape):
    figures = drawn(monkeypatch)
    labels, embeddings = clusters()
    images = torch.rand(len(labels), *shape, generator=torch.Generator().manual_seed(1))
    plot_retrieval_grid(images, labels, embeddings, tmp_path / "grid.png", queries=4, neighbors=3)
    axes = figures[0].axes
    assert len(axes) == 4 * (1 + 3)
    counts = {GREEN: 0, RED: 0}
    for row in range(4):
        query, *found = axes[4 * row : 4 * row + 4]
        for ax in found:
            color = tuple(round(255 * c) for c in matplotlib.colors.to_rgb(ax.spines["left"].get_edgecolor()))
            assert color == (GREEN if ax.get_xlabel() == query.get_xlabel() else RED)
            assert bool(ax.lines) == (color == RED)
            counts[color] += 1
    assert min(counts.values()) > 0
    assert f"{counts[GREEN]} of 12 are" in "".join(text.get_text() for text in figures[0].texts)
    for color in counts:
        assert (np.abs(pixels(tmp_path / "grid.png") - color).sum(axis=2) <= 6).sum() > 500


def test_pictures_are_those_of_the_nearest(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    labels, embeddings = clusters()
    # Every pixel of image i is i / N.
    images = (torch.arange(len(labels)) / len(labels)).view(-1, 1, 1).expand(-1, 4, 4)
    names = [f"class {i} with a long name" for i in range(6)]
    plot_retrieval_grid(images, labels, embeddings, tmp_path / "grid.png", queries=6, neighbors=2, class_names=names)
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    seen = []
    axes = figures[0].axes
    for row in range(6):
        query, *found = [round(float(ax.images[0].get_array()[0, 0, 0]) * len(labels)) for ax in axes[3 * row :][:3]]
        assert found == cosine[query].topk(2).indices.tolist()
        assert axes[3 * row].get_xlabel() == f"class {int(labels[query])} with a…"
        seen.append(int(labels[query]))
    assert sorted(seen) == list(range(6))  # each query of another class


def test_names_that_are_no_text(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    labels, embeddings = clusters(classes=2)
    names = ["cl\udce4ss", "$a^$"]  # a byte that is no UTF-8; what looks like mathematics
    plot_retrieval_grid(torch.rand(10, 4, 4), labels, embeddings, tmp_path / "grid.png", class_names=names)
    assert {ax.get_xlabel() for ax in figures[0].axes} == {"cl?ss", "$a^$"}


def test_more_asked_for_than_there_is(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    labels = torch.tensor([0, 0, 1])
    plot_retrieval_grid(torch.rand(3, 8, 8), labels, torch.rand(3, 4), tmp_path / "grid.png")
    assert len(figures[0].axes) == 2 * (1 + 2)  # the sample alone in its class is no query


def test_seeds_choose_the_queries(tmp_path):
    labels, embeddings = clusters()
    images = torch.rand(len(labels), 8, 8, generator=torch.Generator().manual_seed(2))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        plot_retrieval_grid(images, labels, embeddings, tmp_path / name, queries=2, neighbors=2, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(images=torch.rand(30, 8)), r"images are \(30, 8\); they must be"),
        (dict(images=torch.rand(30, 2, 8, 8)), r"images are \(30, 2, 8, 8\); they must be"),
        (
            dict(images=torch.rand(29, 8, 8)),
            "there are 29 images, 30 labels and 30 embeddings; there must be as many of each",
        ),
        (dict(images=255 * torch.ones(30, 8, 8)), r"images have values from 255 to 255; they must be in \[0, 1\]"),
        (
            dict(images=torch.full((30, 8, 8), torch.nan)),
            r"images have values from nan to nan; they must be in \[0, 1\]",
        ),
        (dict(labels=torch.arange(30)), "labels must have a class with at least two samples"),
        (dict(queries=0), "queries is 0; it must be at least 1"),
        (dict(neighbors=-2), "neighbors is -2; it must be at least 1"),
    ],
)
def test_grid_errors(tmp_path, changes, message):
    labels, embeddings = clusters()
    arguments = dict(images=torch.rand(30, 8, 8), labels=labels, embeddings=embeddings) | changes
    with pytest.raises(UserError, match=message):
        plot_retrieval_grid(**arguments, out_png=tmp_path / "grid.png")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    log, out = write_records(tmp_path / "metrics.jsonl"), tmp_path / "curves.png"
    out.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        plot_curves(log, out)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


@pytest.mark.processes
def test_matplotlib_loads_late_and_without_pyplot(tmp_path):
    log = write_records(tmp_path / "metrics.jsonl")
    code = (
        "import sys; from pathlib import Path; from gcahng.runs import plots; "
        "assert 'matplotlib' not in sys.modules; "
        f"plots.plot_curves(Path({str(log)!r}), Path({str(tmp_path / 'curves.png')!r})); "
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r'plots: matplotlib is not installed; pip install "gcahng\[train\]"'):
        plot_curves(write_records(tmp_path / "metrics.jsonl"), tmp_path / "curves.png")
