"""The config: round trip, and one clear line for every mistake."""

from __future__ import annotations

from typing import Any

import pytest

from gcahng.config import config_from_dict, config_to_dict
from gcahng.devices import resolve_device
from gcahng.errors import UserError
from gcahng.train import BackboneConfig, DataConfig, GcaConfig, OptimizerConfig, TrainConfig, fit


def test_round_trip() -> None:
    config = TrainConfig(loss="arcface", out="x", gca=GcaConfig(alpha=1.5), optimizer=OptimizerConfig(proxy_lr=0.2))
    assert config_from_dict(config_to_dict(config)) == config
    assert config_from_dict({}) == TrainConfig()
    assert config_from_dict({"data": {"max_shift": 0}}) == TrainConfig(data=DataConfig(max_shift=0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 1}, "lr is not an option"),
        ({"gca": {"x": 1}}, "gca.x is no"),
        ({"optimizer": None}, "optimizer is null; it must hold its options, such as lr, or be left out"),
        ({"gca": []}, r"gca is \[\]; it must"),
        ({"data": 5}, "data is 5; it must"),
    ],
)
def test_unknown_names(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_dict(values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(loss="triplet"), "loss is 'triplet'; it must be one of gca_hng, npair"),  # type: ignore[arg-type]
        (TrainConfig(gca=GcaConfig(base="gca_hng")), "gca.base is 'gca_hng'"),  # type: ignore[arg-type]
        (TrainConfig(precision="fp8"), "precision is 'fp8'"),  # type: ignore[arg-type]
        (TrainConfig(steps=0), "steps is 0"),
        (TrainConfig(steps_per_epoch=0), "steps_per_epoch is 0"),
        (TrainConfig(eval_every=0), "eval_every is 0"),
        (TrainConfig(log_every=-1), "log_every is -1"),
        (TrainConfig(seed=-1), "seed is -1"),
        (TrainConfig(seed=2**63), "seed is 9223372036854775808; it must be a whole number of at least 0 and at most"),
        (TrainConfig(threads=0), "threads is 0"),
        (
            TrainConfig(data=DataConfig(name="folder", root=".", image_size=320)),
            "data.resize is 256 and data.image_size 320",
        ),
        (
            TrainConfig(gca=GcaConfig(impl="cuda"), device="cpu"),
            "impl is 'cuda', which is not available for loss on cpu",
        ),
        (TrainConfig(data=DataConfig(samples_per_class=1)), "data.samples_per_class is 1"),
        (TrainConfig(data=DataConfig(classes_per_batch=1)), "data.classes_per_batch is 1"),
        (TrainConfig(data=DataConfig(max_shift=-1)), "data.max_shift is -1"),
        (TrainConfig(backbone=BackboneConfig(width=0)), "backbone.width is 0"),
        (TrainConfig(optimizer=OptimizerConfig(lr=-1.0)), "optimizer.lr is -1.0"),
        (TrainConfig(optimizer=OptimizerConfig(lr=float("nan"))), "optimizer.lr is nan"),
        (
            TrainConfig(optimizer=OptimizerConfig(clip_value=0.0)),
            "optimizer.clip_value is 0.0; it must be a number above 0",
        ),
        (TrainConfig(optimizer=OptimizerConfig(proxy_lr=-0.1)), "optimizer.proxy_lr is -0.1"),
        (TrainConfig(device="tpu"), "device is 'tpu'; it must be auto, cpu, cuda or cuda:N"),
        (TrainConfig(device="meta"), "device is 'meta'"),
        (TrainConfig(device="cuda:99"), "device is 'cuda:99'; PyTorch finds"),
        (TrainConfig(gca=GcaConfig(heads=5), data=DataConfig(classes_per_batch=4), device="cpu"), "heads is 5"),
        (TrainConfig(data=DataConfig(classes_per_batch=13), device="cpu"), "classes_per_batch is 13"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(
    config: TrainConfig, message: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        fit(config)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_titles() -> None:
    assert TrainConfig().loss_title == "gca_hng"
    assert TrainConfig(gca=GcaConfig(base="supcon")).loss_title == "gca_hng-supcon"
    assert TrainConfig(loss="npair", gca=GcaConfig(base="supcon")).loss_title == "npair"


def test_devices() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda")
