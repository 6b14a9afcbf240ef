"""gcahng import-official: all three networks, full files and the feature extractor alone, and what does not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from tiers import few
from torch import Tensor, nn

from gcahng import recipes
from gcahng.cli import main
from gcahng.config import BackboneConfig
from gcahng.losses import GCAHNGLoss
from gcahng.losses.official import load_official_state_dict, official_state_dict
from gcahng.models.backbones import build_backbone
from gcahng.models.model_file import load_model

KEYS = json.loads((Path(__file__).parents[1] / "golden" / "official_checkpoint_keys.json").read_text())
NETWORKS = {"googlenet": "Googlenet", "resnet50": "Resnet50", "dino": "DINO"}
State = dict[str, Tensor]


@cache
def checkpoint(backbone: str) -> State:
    """A full checkpoint in the authors' names and shapes, every tensor different."""
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name, shape in KEYS[NETWORKS[backbone]].items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(3)
        elif len(shape) > 1:  # as large as keeps what comes in
            state[name] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        else:
            state[name] = 0.5 + torch.rand(shape, generator=generator)
    return state


@cache
def small_checkpoint(num_classes: int = 100, layers: int = 2) -> State:
    """GoogLeNet without auxiliary heads and with D = 16, which is written fast."""
    dim, generator = 16, torch.Generator().manual_seed(8)
    state = {name: value for name, value in checkpoint("googlenet").items() if name.startswith("feature_extractor.")}
    state = {name: value for name, value in state.items() if ".aux" not in name}
    state["feature_extractor.fc.1.weight"] = torch.rand(dim, 1024, generator=generator)
    state["feature_extractor.fc.1.bias"] = torch.rand(dim, generator=generator)
    return state | official_state_dict(GCAHNGLoss(num_classes, dim, layers=layers, heads=2))


def extractor_only(state: State) -> State:
    return {name: value for name, value in state.items() if name.startswith("feature_extractor.")}


def run(file: Path, out: Path, backbone: str, *options: str) -> int:
    return main(["import-official", str(file), "--backbone", backbone, str(out), *options])


def authors_embeddings(backbone: str, state: State, images: Tensor) -> Tensor:
    """The authors' forward, written down with the libraries' own networks."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = (images / 255 - mean) / std
    prefix = "feature_extractor.backbone." + ("model." if backbone == "resnet50" else "")
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    seen = []
    network: nn.Module
    if backbone == "googlenet":
        network = torchvision.models.GoogLeNet(transform_input=True, init_weights=False)
        network.inception5b.register_forward_hook(lambda module, inputs, output: seen.append(output))
    elif backbone == "resnet50":
        network = torchvision.models.resnet50()
        network.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
    else:
        network = timm.create_model("vit_small_patch16_224", num_classes=0)
        network.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    network.load_state_dict(weights)
    network.eval()(x)
    (found,) = seen
    if backbone == "googlenet":
        features = found.mean(dim=(2, 3))
    elif backbone == "resnet50":
        features = found.mean(dim=(2, 3)) + found.amax(dim=(2, 3))
    else:
        features = found[:, 0]
    head = nn.Sequential(nn.BatchNorm1d(features.shape[1]), nn.Linear(features.shape[1], len(state["gnn.fc.0.bias"])))
    prefix = "feature_extractor.fc."
    head.load_state_dict({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})
    return head.eval()(features)


@pytest.mark.parametrize("backbone", few(list(NETWORKS)))
@torch.no_grad()
def test_a_full_checkpoint(backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = checkpoint(backbone)
    torch.save(state, tmp_path / "authors.pth")
    out = tmp_path / "ours.safetensors"
    assert run(tmp_path / "authors.pth", out, backbone) == 0
    said = capsys.readouterr().out
    assert (backbone != "googlenet") or "22 tensors that nothing uses" in said  # auxiliary heads and classifier
    assert str(out) in said and "2 layers, 100 training classes" in said and "--data.name cub200" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "authors.pth",
        "ours.loss.safetensors",
        "ours.safetensors",
    ]

    model = load_model(out)
    size = 224 if backbone == "dino" else 64
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found, expected = model.network(images), authors_embeddings(backbone, state, images)
    assert expected.isfinite().all() and expected.std(dim=0).min() > 0  # the images tell
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    recipe = recipes.load(f"{backbone}_cub200")
    assert (model.config.backbone, model.config.gca) == (recipe.backbone, recipe.gca)
    assert (model.config.data.name, model.preprocessing.resize, model.preprocessing.crop) == ("cub200", 256, 224)

    saved = load_file(tmp_path / "ours.loss.safetensors")
    gca = GCAHNGLoss(100, model.config.backbone.embedding_dim, layers=2, heads=4)
    load_official_state_dict(gca, saved)
    wanted = {name: value for name, value in state.items() if not name.startswith("feature_extractor.")}
    loaded = official_state_dict(gca)
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[name], wanted[name]) for name in wanted)

    if backbone != "googlenet":
        return
    again = build_backbone(
        BackboneConfig(
            name=model.config.backbone.name,
            embedding_dim=model.config.backbone.embedding_dim,
            pool=model.config.backbone.pool,
            weights=str(out),
        )
    )
    assert torch.equal(again.eval()(images), model.network(images))


@pytest.mark.thorough
def test_the_feature_extractor_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = small_checkpoint()
    alone = extractor_only(state)
    bare = {name.removeprefix("feature_extractor."): value for name, value in alone.items()}
    with_classifier = alone | {name: value for name, value in state.items() if name.startswith("softmax_classifier.")}
    saved = []
    for number, variant in enumerate((state, alone, bare, with_classifier)):
        torch.save(variant, tmp_path / "authors.pth")
        assert run(tmp_path / "authors.pth", tmp_path / f"{number}.safetensors", "googlenet") == 0
        saved.append(load_file(tmp_path / f"{number}.safetensors"))
        assert (tmp_path / f"{number}.loss.safetensors").exists() == (number == 0)
    assert "softmax_classifier.weight, softmax_classifier.bias" in capsys.readouterr().out
    assert all(torch.equal(other[name], saved[0][name]) for other in saved[1:] for name in saved[0])
    # Nothing tells the data set, so that the user must.
    assert load_model(tmp_path / "2.safetensors").config.data.name == "folder"
    assert run(tmp_path / "authors.pth", tmp_path / "4.safetensors", "googlenet", "--data", "sop") == 0
    config = load_model(tmp_path / "4.safetensors").config
    assert (config.data.name, config.gca.layers, config.gca.heads) == ("sop", 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet50", "dino"])
def test_the_feature_extractor_alone_of_the_others(backbone: str, tmp_path: Path) -> None:
    alone = extractor_only(checkpoint(backbone))
    bare = {name.removeprefix("feature_extractor."): value for name, value in alone.items()}
    found = []
    for number, variant in enumerate((alone, bare)):
        torch.save(variant, tmp_path / "authors.pth")
        assert run(tmp_path / "authors.pth", tmp_path / f"{number}.safetensors", backbone) == 0
        found.append(load_file(tmp_path / f"{number}.safetensors"))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
    assert torch.equal(found[0]["head.1.weight"], alone["feature_extractor.fc.1.weight"])


@pytest.mark.parametrize("number", range(2), ids=["safetensors", "wrapped"])
def test_other_files_of_the_same(number: int, tmp_path: Path) -> None:
    """Half precision, one layer and other sizes, in a safetensors file, or under state_dict with `module.`."""
    state = small_checkpoint(11318, layers=1)
    state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    file = tmp_path / ("authors.safetensors" if number == 0 else "authors.pth")
    if number == 0:
        save_file(state, file)
    else:
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, file)
    assert run(file, tmp_path / "out.safetensors", "googlenet") == 0
    model = load_model(tmp_path / "out.safetensors")
    assert (model.config.data.name, model.config.gca.layers) == ("sop", 1)
    assert {value.dtype for value in model.network.parameters()} == {torch.float32}
    saved = load_file(tmp_path / "out.loss.safetensors")
    assert saved["softmax_classifier.weight"].shape == (11318, 16)
    assert torch.equal(saved["gnn.fc.0.weight"], state["gnn.fc.0.weight"].float())


def renamed(old: str, new: str) -> Callable[[State], None]:
    return lambda state: state.update({new: state.pop(old)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda s: s.pop("feature_extractor.backbone.conv1.bn.weight"),
            "does not fit the authors' googlenet; missing: feature_extractor.backbone.conv1.bn.weight",
        ),
        (lambda s: s.pop("feature_extractor.fc.1.weight"), "missing: feature_extractor.fc.1.weight"),
        (lambda s: s.pop("gnn.gnn.1.edge_model.norm.1.bias"), "missing: gnn.gnn.1.edge_model.norm.1.bias"),
        (lambda s: s.pop("softmax_classifier.weight"), "missing: softmax_classifier.weight; of another shape:"),
        (lambda s: s.update({"optimizer.x": torch.zeros(1)}), "unexpected: optimizer.x"),
        (lambda s: s.update({"gnn.fc.9.bias": torch.zeros(1)}), "unexpected: gnn.fc.9.bias"),
        (
            renamed("feature_extractor.backbone.conv2.conv.weight", "feature_extractor.backbone.conv2.w"),
            "missing: feature_extractor.backbone.conv2.conv.weight; unexpected: feature_extractor.backbone.conv2.w",
        ),
        (
            lambda s: s.update({"feature_extractor.backbone.conv1.bn.bias": torch.zeros(5)}),
            "of another shape: feature_extractor.backbone.conv1.bn.bias is (5,) and must be (64,)",
        ),
        (
            lambda s: s.update({"gnn.dim_red.bias": torch.zeros(5)}),
            "of another shape: gnn.dim_red.bias is (5,) and must be (16,)",
        ),
    ],
)
def test_what_does_not_fit_is_listed_and_writes_nothing(
    edit: Callable[[State], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = dict(small_checkpoint())
    edit(state)
    torch.save(state, tmp_path / "authors.pth")
    assert run(tmp_path / "authors.pth", tmp_path / "out.safetensors", "googlenet") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["authors.pth"]


class RunsCode:
    """Unpickling writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.trace,)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "authors.pth", tmp_path / "out.safetensors"

    def said(backbone: str = "resnet50", out: Path = out) -> str:
        assert run(file, out, backbone) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "authors.pth does not exist" in said()
    torch.save({"feature_extractor.fc.1.bias": RunsCode(tmp_path / "trace")}, file)
    assert "could run code" in said() and not (tmp_path / "trace").exists()
    torch.save(small_checkpoint(), file)
    assert "authors.pth holds the authors' googlenet; it must be 'googlenet'" in said()
    assert "it must end in .safetensors" in said("googlenet", tmp_path / "out.pth")
    assert "there is no folder" in said("googlenet", tmp_path / "nowhere" / "out.safetensors")
    assert "argument --backbone: invalid choice" in said("vgg")
    # A folder: as root, no other place cannot be written.
    refusals = {"out.safetensors": ", a folder; it must be a file"}
    refusals["out.loss.safetensors"] = " cannot be written: Is a directory"
    for taken, message in refusals.items():
        (tmp_path / taken).mkdir()
        assert f"{taken}{message}" in said("googlenet")
        (tmp_path / taken).rmdir()
    out.unlink()
    torch.save({"a": torch.zeros(1)}, file)
    assert "unexpected: a" in said()
    assert [path.name for path in tmp_path.iterdir()] == ["authors.pth"]
