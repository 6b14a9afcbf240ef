"""gcahng export: equal outputs at any batch size, and files that say what they are."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gcahng.cli import main
from gcahng.data import DataSplits
from gcahng.errors import UserError
from gcahng.evaluation.embed import embed
from gcahng.evaluation.evaluate import evaluate_checkpoint, metrics_of
from gcahng.models.backbones import build_backbone
from gcahng.models.export import ABOUT_FILE, about, export_model, onnx_network
from gcahng.models.model_file import Model, load_model, save_model
from gcahng.train import BackboneConfig, DataConfig, TrainConfig


def make_model(data: DataConfig) -> Model:
    """Random weights, and running statistics that differ from the initial ones."""
    torch.manual_seed(3)
    config = TrainConfig(data=data, backbone=BackboneConfig(embedding_dim=16, width=4))
    network = build_backbone(config.backbone)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
    return Model(network.eval(), config, Path("run/checkpoints/last.pt"), step=7, data_digest="0123456789abcdef")


@pytest.fixture(scope="module")
def gray() -> Model:
    return make_model(DataConfig())


@pytest.fixture(scope="module")
def gray_onnx(gray: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "gray.onnx"
    worst = export_model(gray, out)
    assert worst is not None and worst <= 1e-5
    return out


def images_for(model: Model, count: int) -> Tensor:
    shape = (32, 32) if model.config.data.name == "glyphs" else (3, model.preprocessing.crop, model.preprocessing.crop)
    return torch.randint(256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", [1, 3, 16])
def test_onnx_gives_the_networks_outputs(gray: Model, gray_onnx: Path, count: int) -> None:
    """ONNX Runtime runs the file by the documented names, without gcahng."""
    import onnxruntime

    images = images_for(gray, count)
    session = onnxruntime.InferenceSession(str(gray_onnx), providers=["CPUExecutionProvider"])
    (got,) = session.run(["embeddings"], {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), gray.network(images), rtol=1e-5, atol=1e-5)


def test_onnx_says_what_it_is(gray: Model, gray_onnx: Path) -> None:
    import onnx

    model = onnx.load(gray_onnx)
    onnx.checker.check_model(model)
    (given,), (taken,) = model.graph.output, model.graph.input
    assert (taken.name, given.name) == ("images", "embeddings")
    assert taken.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    dimensions = [d.dim_param or d.dim_value for d in taken.type.tensor_type.shape.dim]
    assert dimensions == ["batch", 32, 32]
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["batch", 16]
    known = {entry.key: entry.value for entry in model.metadata_props}
    assert about(gray).items() <= known.items()
    assert (known["embedding_dim"], known["normalised"], known["input"]) == ("16", "false", "uint8 (batch, 32, 32)")
    said = {name: json.loads(known[name]) for name in ("size", "interpolation", "mean", "deviation")}
    assert said == {"size": [32, 32], "interpolation": None, "mean": [0.0], "deviation": [1.0]}


def test_a_file_says_how_images_are_prepared() -> None:
    """Following what it says gives what the network is fed."""
    import numpy as np
    from PIL import Image
    from torchvision.transforms import v2

    data = DataConfig(name="folder", image_size=64, resize=80)
    backbone = BackboneConfig(name="torchvision:resnet50", pretrained=False, embedding_dim=8)
    model = Model(build_backbone(backbone).eval(), TrainConfig(data=data, backbone=backbone), Path("x"))
    known = about(model)
    said = {name: json.loads(known[name]) for name in ("size", "interpolation", "mean", "deviation", "preprocessing")}
    assert said["size"] == [64, 64] and said["interpolation"] == "bilinear, antialiased"
    assert said["preprocessing"] == {
        "exif_rotate": True,
        "resize_shorter_side": 80,
        "interpolation": "bilinear, antialiased",
        "center_crop": 64,
    }
    pixels = np.random.default_rng(0).integers(0, 256, (160, 240, 3), dtype=np.uint8)
    wide = Image.fromarray(pixels).resize((120, 80), Image.Resampling.BILINEAR)
    ours = v2.Compose([v2.Resize(80), v2.CenterCrop(64), v2.PILToTensor()])(Image.fromarray(pixels))
    left, top = (120 - 64) // 2, (80 - 64) // 2
    images = torch.from_numpy(np.array(wide.crop((left, top, left + 64, top + 64)))).movedim(2, 0)
    assert (images.int() - ours.int()).abs().max() <= 1
    fed: list[Tensor] = []
    model.network.body.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))
    with torch.no_grad():
        model.network(images[None])
    mean, deviation = (torch.tensor(said[name])[:, None, None] for name in ("mean", "deviation"))
    torch.testing.assert_close(fed[0][0], (images / 255 - mean) / deviation)


@pytest.mark.thorough
def test_color_and_another_operator_set(tmp_path: Path) -> None:
    import onnx

    model = make_model(DataConfig(name="folder", image_size=24, resize=30))
    out = tmp_path / "color.onnx"
    export_model(model, out, opset=18)
    assert [entry.version for entry in onnx.load(out).opset_import if entry.domain == ""] == [18]
    images = images_for(model, 4)
    with torch.no_grad():
        torch.testing.assert_close(onnx_network(out)(images), model.network(images), rtol=1e-5, atol=1e-5)
    loaded = load_model(out)
    assert (loaded.preprocessing.resize, loaded.preprocessing.crop) == (30, 24)
    with pytest.raises(UserError, match=r"images are torch.uint8 \(2, 24, 24\); the ONNX file takes uint8 \(batch, 3"):
        loaded.network(images[:2, 0])


def test_a_program_gives_the_networks_outputs(gray: Model, tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "gray.pt2"
    assert export_model(gray, out) <= 1e-5
    extra = {ABOUT_FILE: ""}
    program = torch.export.load(out, extra_files=extra).module()
    assert json.loads(extra[ABOUT_FILE]) == about(gray)
    assert all(parameter.requires_grad for parameter in gray.network.parameters())
    for count in (1, 6):
        images = images_for(gray, count)
        embeddings = program(images)
        assert not embeddings.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(embeddings, gray.network(images), rtol=1e-5, atol=1e-5)


def test_it_is_evaluated_in_the_place_of_its_model(gray: Model, gray_onnx: Path, small_data: DataSplits) -> None:
    loaded = load_model(gray_onnx)
    assert (loaded.config, loaded.step, loaded.data_digest) == (gray.config, gray.step, gray.data_digest)
    device = torch.device("cpu")
    got = embed(loaded.network, small_data.test, device)
    torch.testing.assert_close(got, embed(gray.network, small_data.test, device), rtol=1e-5, atol=1e-5)
    result = evaluate_checkpoint(gray_onnx, device="cpu")
    assert result["test"] == metrics_of(got, small_data.test) and result["checkpoint"] == str(gray_onnx)


def test_gcahng_eval_takes_it(gray: Model, gray_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, values = tmp_path / "gray.safetensors", {}
    save_model(weights, gray.network.state_dict(), gray.config)
    for name, words in (("onnx", ["--onnx", str(gray_onnx)]), ("model", [str(weights)])):
        written = tmp_path / f"{name}.json"
        assert main(["eval", *words, "--split", "val", "--device", "cpu", "--json", str(written)]) == 0
        values[name] = json.loads(written.read_text())["val"]
    assert values["onnx"] == pytest.approx(values["model"], abs=1e-3)  # rounding may swap neighbors
    assert main(["eval", str(weights), "--onnx", str(gray_onnx)]) == 2
    assert main(["eval", "--onnx", str(tmp_path / "x.pt")]) == 2
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert (
        first.endswith("are given; give only one of them")
        and "it must be a .onnx file that gcahng export wrote" in second
    )


def test_paths_may_be_strings(gray: Model, gray_onnx: Path, tmp_path: Path) -> None:
    images = images_for(gray, 2)
    out = str(tmp_path / "gray.pt2")
    assert export_model(gray, out) is not None and Path(out).is_file()
    assert torch.equal(onnx_network(str(gray_onnx))(images), onnx_network(gray_onnx)(images))
    assert load_model(str(gray_onnx)).path == gray_onnx
    assert evaluate_checkpoint(str(gray_onnx), split="val", device="cpu")["checkpoint"] == str(gray_onnx)


def test_the_command(gray: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "model.safetensors", tmp_path / "model.pt2"
    save_model(file, gray.network.state_dict(), gray.config)
    assert main(["export", str(file), str(out)]) == 0
    said = capsys.readouterr().out
    assert "outputs agree to" in said and f"written     {out}, from {file}" in said and out.is_file()


class Unfaithful(nn.Module):
    """Another network while it is exported."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, images: Tensor) -> Tensor:
        embeddings = self.network(images)
        return embeddings * self.factor if torch.compiler.is_exporting() else embeddings


@pytest.mark.parametrize(
    ("suffix", "factor", "by"), [(".onnx", 1.001, "0.001"), (".pt2", 1.001, "0.001"), (".pt2", float("nan"), "nan")]
)
def test_a_network_that_differs_is_not_written(
    gray: Model, tmp_path: Path, suffix: str, factor: float, by: str
) -> None:
    out = tmp_path / f"x{suffix}"
    out.write_text("old")
    network = Unfaithful(gray.network, factor)
    with pytest.raises(UserError, match=f"differs from the original by {by} of .* nothing was written"):
        export_model(replace(gray, network=network), out)
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]
    if suffix == ".pt2":
        assert export_model(replace(gray, network=network), out, check=False) is None


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("x.txt", {}, r"out is .*x\.txt; it must end in \.onnx or \.pt2"),
        ("file/x.onnx", {}, "out is .*; .* is a file, not a folder"),
        ("x.onnx", {"opset": 11}, "opset is 11; it must be None or a whole number of at least 18"),
        ("x.pt2", {"opset": 18}, "only ONNX has operator sets"),
    ],
)
def test_mistakes(gray: Model, tmp_path: Path, out: str, options: dict[str, int], message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        export_model(gray, tmp_path / out, **options)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_what_is_no_export_of_ours(gray_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    with pytest.raises(UserError, match="which is ONNX already"):
        export_model(load_model(gray_onnx), tmp_path / "x.onnx")
    file = tmp_path / "x.onnx"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        onnx_network(file)
    file.write_bytes(gray_onnx.read_bytes()[:-500])
    with pytest.raises(UserError, match="is not an ONNX file, or it is damaged") as error:
        onnx_network(file)
    assert "\n" not in str(error.value)
    model = onnx.load(gray_onnx)
    for entry in model.metadata_props:
        entry.value = "{" if entry.key == "gcahng" else entry.value
    onnx.save(model, file)
    with pytest.raises(UserError, match="does not say how its network was made, or is damaged"):
        onnx_network(file)
    del model.metadata_props[:]
    onnx.save(model, file)
    with pytest.raises(UserError, match=r"was not written by gcahng export"):
        onnx_network(file)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'onnxruntime is not installed; pip install "gcahng\[export\]"'):
        onnx_network(gray_onnx)


def test_a_full_disk(gray: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        export_model(gray, tmp_path / "x.pt2", check=False)
    assert not list(tmp_path.iterdir())
