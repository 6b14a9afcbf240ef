"""A network with ImageNet's weights, trained from the defaults to the last metric, against the default network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gcahng.train import BackboneConfig, OptimizerConfig, TrainConfig, fit


@pytest.mark.slow
def test_a_pretrained_network_finds_more_than_the_small_one(tmp_path: Path) -> None:
    """The two runs of docs/recipes.md, each at its own rate; about five minutes on one core."""
    small = TrainConfig(
        steps=300, steps_per_epoch=100, eval_every=300, device="cpu", threads=1, out=str(tmp_path / "small")
    )
    pretrained = replace(
        small,
        backbone=BackboneConfig(name="efficientnet_lite0", freeze_bn=True),
        optimizer=OptimizerConfig(lr=1e-4),
        out=str(tmp_path / "pretrained"),
    )
    found = {Path(config.out).name: fit(config)["test"]["recall@1"] for config in (small, pretrained)}
    assert found["pretrained"] > found["small"] > 0.7, found
