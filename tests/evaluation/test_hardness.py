"""The record of generated negatives: it equals plain loops, and measuring it does not change a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gcahng.data import DataSplits, ImageFiles, UnreadableImage
from gcahng.evaluation.hardness import THETA_BINS, NegativesProbe, _fixed_rows, _spread, negatives_record
from gcahng.losses import GCAHNGLoss
from gcahng.train import DataConfig, TrainConfig, fit
from gcahng.train.trainer import Trainer

FinishedRun = tuple[Path, dict[str, Any]]


def test_the_record_equals_plain_loops() -> None:
    torch.manual_seed(0)
    classes, views, dim = 4, 3, 8
    gca = GCAHNGLoss(classes, dim, layers=1, heads=2, impl="reference", seed=1).eval()
    order = torch.randperm(classes * views)
    labels = torch.arange(classes).repeat_interleave(views)[order]
    z = torch.randn(classes * views, dim)
    mixing = torch.rand(views, views - 1)
    found = gca.generate(z, labels, u=mixing)
    record = negatives_record(gca, z, labels, mixing)

    real, synthetic, positive, nearest_real, nearest_synthetic, harder, apart = [], [], [], [], [], [], []
    for a in range(classes):
        for k in range(views):
            row = int(found.index[k, a])
            to = [float((z[row].double() - z[j].double()).norm()) for j in range(len(z))]
            others = [to[j] for j in range(len(z)) if labels[j] != labels[row]]
            made = {
                c: float((z[row].double() - found.negatives[k, a, c].double()).norm()) for c in range(classes) if c != a
            }
            real += others
            synthetic += made.values()
            positive += [to[j] for j in range(len(z)) if labels[j] == labels[row] and j != row]
            nearest_real.append(min(others))
            nearest_synthetic.append(min(made.values()))
            own = found.negatives[k, a].double()
            apart += [float((own[b] - own[c]).norm()) for b in made for c in made if b != c]
            harder += [made[c] < min(to[j] for j in range(len(z)) if labels[j] == c) for c in made]
    theta = torch.cat(
        [found.coefficients[i, j] for i in range(len(z)) for j in range(len(z)) if labels[i] != labels[j]]
    )

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    expected = {
        "real": mean(real),
        "synthetic": mean(synthetic),
        "positive": mean(positive),
        "hardest_real": mean(nearest_real),
        "hardest_synthetic": mean(nearest_synthetic),
        "nearer": mean([float(value) for value in harder]),
        "apart": mean(apart),
        "theta_mean": theta.double().mean().item(),
        "theta_std": theta.double().std().item(),
    }
    for name, value in expected.items():
        assert record[name] == pytest.approx(value, rel=1e-6), name
    assert 0 < record["nearer"] < 1
    for name, values in (("real", real), ("synthetic", synthetic)):
        for share in (0.1, 0.9):
            edge = sorted(values)[round(share * (len(values) - 1))]
            assert record[f"{name}_p{round(100 * share)}"] == pytest.approx(edge, rel=1e-6)
    counts = [((theta * THETA_BINS).floor() == b).sum().item() / len(theta) for b in range(THETA_BINS)]
    assert record["theta_histogram"] == pytest.approx(counts)


def test_one_negative_is_not_apart_from_others() -> None:
    gca = GCAHNGLoss(2, 8, layers=1, heads=2, impl="reference", seed=1).eval()
    record = negatives_record(gca, torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))
    assert "apart" not in record and record["nearer"] in (0, 0.25, 0.5, 0.75, 1)


def test_it_leaves_no_trace(small_data: DataSplits, small_config: Callable[..., TrainConfig]) -> None:
    trainer = Trainer(small_config(), small_data)
    trainer.train_step()
    probe = NegativesProbe(trainer.config, small_data.train, trainer.device)
    trainer.objective.gca.classifier.eval()  # a mode of its own, to be found again
    before = torch.get_rng_state()
    state = dict(trainer.model.state_dict() | trainer.objective.state_dict())
    state = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    first = probe.measure(trainer.model, trainer.objective)
    assert first and probe.measure(trainer.model, trainer.objective) == first
    assert torch.equal(torch.get_rng_state(), before)
    after = trainer.model.state_dict() | trainer.objective.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert trainer.model.training and trainer.objective.gca.training and not trainer.objective.gca.classifier.training
    trainer.train_step()
    assert probe.measure(trainer.model, trainer.objective) != first


def test_it_measures_in_evaluation_mode(small_data: DataSplits, small_config: Callable[..., TrainConfig]) -> None:
    trainer = Trainer(small_config(), small_data)
    trainer.train_step()
    probe = NegativesProbe(trainer.config, small_data.train, trainer.device)
    found = probe.measure(trainer.model, trainer.objective)
    trainer.model.eval()
    trainer.objective.eval()
    assert probe.measure(trainer.model, trainer.objective) == found
    images, labels = probe._read()
    with torch.no_grad():
        assert negatives_record(trainer.objective.gca, trainer.model(images), labels, probe._mixing) == found


def test_a_run_has_the_same_bits_without_it(
    finished_run: FinishedRun, small_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gcahng.evaluation.hardness.NegativesProbe.measure", lambda *_: {})
    without = fit(small_config(out=str(tmp_path / "run")))
    assert without["test"] == finished_run[1]["test"]
    assert '"negatives"' not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_line_an_evaluation(finished_run: FinishedRun) -> None:
    lines = [json.loads(line) for line in (finished_run[0] / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if line["kind"] == "negatives"]
    assert [record["step"] for record in records] == [4, 6]
    for record in records:
        assert math.isclose(sum(record["theta_histogram"]), 1, abs_tol=1e-5)
        assert 0 < record["synthetic_p10"] <= record["synthetic_p90"] and 0 < record["theta_mean"] < 1


def test_a_loss_without_a_generator_has_no_record(
    small_data: DataSplits, small_config: Callable[..., TrainConfig]
) -> None:
    trainer = Trainer(small_config(loss="npair"), small_data)
    probe = NegativesProbe(trainer.config, small_data.train, trainer.device)
    assert probe.measure(trainer.model, trainer.objective) == {}


def test_files_that_cannot_be_read(small_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    names = tuple(f"{c}/{i}.png" for c in range(6) for i in range(5))
    labels = torch.arange(6).repeat_interleave(5)
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (20, 24), 8 * number).save(tmp_path / name)
    whole = ImageFiles(tmp_path, names, labels, tuple("abcdef"))
    data = DataConfig(classes_per_batch=4, samples_per_class=3, image_size=16, resize=16)

    def batch_of(**fields: Any) -> torch.Tensor:
        config = small_config(data=replace(data, **fields))
        images, labels = NegativesProbe(config, whole, torch.device("cpu"))._read()
        assert labels.tolist() == [label for label in labels[::3].tolist() for _ in range(3)]
        assert len(images) == 12 and len(labels.unique()) == 4
        return images[:, 0, 0, 0] // 8  # which image of `whole` each is

    expected = batch_of()
    assert torch.equal(batch_of(skip_unreadable=True), expected)
    lost = expected[[0, 5, 6]].tolist()
    for number in lost:
        (tmp_path / names[number]).write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match="cannot be read as an image"):
        batch_of()
    found = batch_of(skip_unreadable=True)
    assert not set(found.tolist()) & set(lost) and torch.equal(batch_of(skip_unreadable=True), found)
    for name in names[5:]:
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(UnreadableImage):
        batch_of(skip_unreadable=True)


def test_edges_of_a_spread_without_kthvalue(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses kthvalue on CUDA under `deterministic`."""
    monkeypatch.setattr(torch.Tensor, "kthvalue", None)
    values = torch.arange(101.0)[torch.randperm(101)]
    assert _spread("real", values) == {"real": 50.0, "real_p10": 10.0, "real_p90": 90.0}


def test_small_classes_only_where_others_are_lacking() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 3, 4, 4, 4])
    rows = _fixed_rows(labels, 3, 3, torch.Generator().manual_seed(0))
    assert sorted(labels[rows].tolist()) == [0, 0, 0, 2, 2, 2, 4, 4, 4] and len(set(rows.tolist())) == 9
    rows = _fixed_rows(labels, 5, 3, torch.Generator().manual_seed(0))
    assert torch.bincount(labels[rows]).tolist() == [3] * 5
