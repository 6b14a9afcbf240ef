"""The networks of the recipes train for a few steps on a small tree in CUB's format, from files to the optimizer."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gcahng import recipes
from gcahng.data import build_batches, load_data
from gcahng.models.backbones import build_backbone
from gcahng.train.losses import build_objective
from gcahng.train.optim import build_optimizer, prepare_step

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import trees
from tiers import few

STEPS_PER_EPOCH = 1


@pytest.mark.parametrize("name", few(["googlenet_cub200", "resnet50_cub200", "dino_cub200"]))
def test_a_recipe_trains_on_files(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(name)
    size = 224 if name.startswith("dino") else 64
    data = replace(
        recipe.data,
        root=str(trees.make_cub200(tmp_path / "cub", classes=6, images=4)),
        classes_per_batch=3,
        samples_per_class=2,
        image_size=size,
        resize=size,
        workers=0,
    )
    config = replace(recipe, data=data, backbone=replace(recipe.backbone, pretrained=False), epochs=3)
    config = config.with_epochs(STEPS_PER_EPOCH)
    splits = load_data(config.data)
    assert splits.train.num_classes == 3 and splits.val is None
    torch.manual_seed(0)
    batches = build_batches(config.data, splits.train, seed=0, device=torch.device("cpu"))
    model, objective = build_backbone(config.backbone), build_objective(config, splits.train.num_classes)
    optimizer = build_optimizer(config, model, objective)
    body = {key: value.detach().clone() for key, value in model.body.named_parameters()}
    warm_up = config.optimizer.warmup_epochs
    for step in range(warm_up + 1):
        prepare_step(config, step, model, optimizer)
        images, labels = batches.batch(step)
        assert images.shape == (6, 3, size, size) and images.dtype is torch.uint8
        loss = objective(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        logs = objective.finish_step()
        objective.end_epoch()
        assert loss.isfinite() and all(value.isfinite() for value in logs.values())
        moved = [key for key, value in model.body.named_parameters() if not torch.equal(value, body[key])]
        assert bool(moved) == (step >= warm_up), (step, moved)
    batches.close()
