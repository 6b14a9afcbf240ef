"""The recipes are the authors' table and load by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from gcahng import recipes
from gcahng.cli import main
from gcahng.config import config_to_dict
from gcahng.errors import UserError
from gcahng.train import TrainConfig

TABLE = json.loads((Path(__file__).parents[1] / "golden" / "recipes.json").read_text())
LARGE = {"resnet50_sop_n512": 512, "resnet50_sop_n1024": 1024, "dino_sop_n512": 512, "dino_sop_n1024": 1024}
NETWORKS = {
    "DINO": "timm:vit_small_patch16_224.dino",
    "Googlenet": "torchvision:googlenet",
    "Resnet50": "torchvision:resnet50",
}


def as_row(name: str, config: TrainConfig) -> dict[str, Any]:
    """A recipe in the columns of the authors' table."""
    data, backbone, gca, optimizer = config.data, config.backbone, config.gca, config.optimizer
    assert optimizer.schedule == "step"
    assert gca.graph_weight_decay == optimizer.weight_decay and gca.clip_value == optimizer.clip_value
    return {
        "recipe": name,
        "backbone": next(title for title, network in NETWORKS.items() if network == backbone.name),
        "D": backbone.embedding_dim,
        "avg+max pool": backbone.pool == "avg+max",
        "L": gca.layers,
        "H": gca.heads,
        "C": data.classes_per_batch,
        "K": data.samples_per_class,
        "α": gca.alpha,
        "β": gca.beta,
        "softmax_factor": gca.softmax_factor,
        "w_dot": gca.dot_weight,
        "w_div": gca.div_weight,
        "lr backbone + head": optimizer.lr,
        "lr graph": gca.graph_lr,
        "lr classifier": gca.classifier_lr,
        "step γ": optimizer.step_gamma,
        "step epochs": optimizer.step_epochs,
        "warm-up epochs": optimizer.warmup_epochs,
        "freeze BN": backbone.freeze_bn,
        "freeze patch embed": {"off": False, "official": True}[backbone.freeze_patch_embed],
        "weight decay": optimizer.weight_decay,
        "clip value": optimizer.clip_value,
        "epochs": config.epochs,
        "eval every": config.eval_every_epochs,
    }


def test_all_recipes_are_known() -> None:
    assert len(TABLE) == 12
    assert recipes.names() == sorted([*(row["recipe"] for row in TABLE), *LARGE])


@pytest.mark.parametrize("row", TABLE, ids=[row["recipe"] for row in TABLE])
def test_the_authors_table(row: dict[str, Any]) -> None:
    name = row["recipe"]
    config = recipes.load(name)
    assert as_row(name, config) == row
    # What the table's caption says of all.
    assert config.data.name == name.split("_")[1]
    assert (config.loss, config.gca.base) == ("gca_hng", "npair")
    assert (config.data.image_size, config.data.resize, config.data.crop_scale_min) == (224, 256, 0.08)
    assert config.gca.classifier_weight_decay == 0.01  # AdamW's default
    assert (config.data.val_classes, config.select) == (0, "last")
    assert (config.gca.symmetric, config.gca.compat) == (False, "official")


@pytest.mark.parametrize("name", list(LARGE))
def test_large_batches_follow_the_rule_they_state(name: str) -> None:
    batch = LARGE[name]
    config, base = recipes.load(name), recipes.load(name.rpartition("_")[0])
    assert config.data.classes_per_batch * config.data.samples_per_class == batch
    factor = math.sqrt(batch / (base.data.classes_per_batch * base.data.samples_per_class))
    for found, start in (
        (config.optimizer.lr, base.optimizer.lr),
        (config.gca.graph_lr, base.gca.graph_lr),
        (config.gca.classifier_lr, base.gca.classifier_lr),
    ):
        assert found == float(f"{factor * start:.3g}")
    assert (config.precision, config.gca.symmetric, config.gca.compat) == ("bf16", True, "fixed")
    text = recipes.find(name).read_text()
    assert f"times sqrt({batch} / 80)" in text
    unchanged = ("epochs", "eval_every_epochs", "loss", "select")
    assert all(getattr(config, field) == getattr(base, field) for field in unchanged)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_read_as_it_is_written(name: str) -> None:
    """PyYAML and the command line's parser agree, and values have their options' types (1e-4 would be a string)."""
    from gcahng.commands.train import parse

    config = recipes.load(name)
    config.check()
    assert parse(["--config", str(recipes.find(name))]) == config
    written, whole = yaml.safe_load(recipes.find(name).read_text()), config_to_dict(config)
    for group, values in written.items():
        for key, value in values.items() if isinstance(values, dict) else [(None, values)]:
            default = config_to_dict(TrainConfig())[group]
            default = default if key is None else default[key]
            assert default is None or type(value) is type(default), (group, key, value)
            assert (whole[group] if key is None else whole[group][key]) == value
    steps = config.with_epochs(70)
    assert (steps.steps, steps.steps_per_epoch) == (70 * config.epochs, 70)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50_cub", "resnet50_cub is neither a file nor a recipe; did you mean resnet50_cub200"),
        ("dino-sop", "did you mean dino_sop"),
        ("x.yaml", "x.yaml is neither a file nor a recipe; gcahng recipes lists them"),
        ("../recipes/dino_sop", "is neither a file nor a recipe"),
        ("", "is neither a file nor a recipe"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipes.find(name)


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == recipes.names()
    (line,) = [line for line in lines if line.startswith("resnet50_inshop ")]
    assert " ".join(line.split()) == "resnet50_inshop torchvision:resnet50 512 80 = 40 x 2 1 2 0.0002 0.00015 200"
