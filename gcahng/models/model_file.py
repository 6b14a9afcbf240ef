"""Trained networks as files, which `gcahng eval`, `embed`, `index`, `export` and users' own code load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gcahng.bounds import check_fields
from gcahng.config import TrainConfig, config_of_run, config_to_dict
from gcahng.data import Preprocessing
from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.files import atomic_write, regular_file
from gcahng.models.backbones import build_backbone
from gcahng.models.onnx_network import OnnxNetwork
from gcahng.paths import check_source, check_utf8
from gcahng.runs.checkpoint import find_checkpoint, load_checkpoint

FORMAT = "gcahng-model-1"


@dataclass(frozen=True)
class Model:
    """A trained network and how it was made.

    Attributes:
        network: (n, H, W) or (n, 3, H, W) uint8 images → (n, D) embeddings, which are not normalized; in evaluation
            mode.
        config: of the run; for an imported network only the options of data, backbone and loss have a meaning.
        path: the file that it came from.
        step: the training step; None where it is unknown.
        data_digest: the digest of its training data; None where it is unknown.
    """

    network: nn.Module
    config: TrainConfig
    path: Path
    step: int | None = None
    data_digest: str | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """How image files are prepared for it."""
        return Preprocessing(self.config.data.resize, self.config.data.image_size)


def load_model(source: Path | str, which: str = "last") -> Model:
    """Load a trained network onto the CPU.

    Args:
        source: a run folder, a checkpoint, a .safetensors file, or an .onnx file that `gcahng export` wrote, which ONNX
            Runtime runs.
        which: the checkpoint of a run folder, "last" or "best".

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    check_source("the path of the model", source)
    source = Path(source)
    if source.suffix == ".safetensors":
        return _load_safetensors(source)
    if source.suffix == ".onnx":
        return load_onnx(source)
    path = find_checkpoint(source, which)
    state = load_checkpoint(path)
    config = config_of_run(state["config"])
    return Model(_network(config, state["model"], path), config, path, state["step"], state["data_digest"])


def save_model(
    path: Path,
    tensors: dict[str, Tensor],
    config: TrainConfig,
    *,
    step: int | None = None,
    data_digest: str | None = None,
) -> None:
    """Write a network's state dict with its config as .safetensors, whole or not at all.

    Args:
        path: the file.
        tensors: the state dict.
        config: of the run.
        step: the training step; None where it is unknown.
        data_digest: the digest of the training data; None where it is unknown.
    """
    require("safetensors", extra="train", purpose="weights are written as safetensors")
    from safetensors.torch import save

    about: dict[str, Any] = {"config": config_to_dict(config), "step": step, "data_digest": data_digest}
    # safetensors takes contiguous tensors only, and channels_last weights are not.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(plain, {"format": FORMAT, "gcahng": json.dumps(about)})
    atomic_write(path, lambda file: file.write(content))


def _load_safetensors(path: Path) -> Model:
    require("safetensors", extra="train", purpose=f"{path} is read")
    from safetensors import SafetensorError, safe_open

    check_utf8("the path of the model", path, "safetensors")

    try:
        with safe_open(regular_file(path), framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file, or it is damaged ({error})") from error
    if about.get("format") != FORMAT:
        raise UserError(f"{path} was not written by gcahng; its format is {about.get('format')!r}, not {FORMAT!r}")
    config, step, digest = how_made(about, path)
    return Model(_network(config, tensors, path), config, path, step, digest)


def load_onnx(path: Path) -> Model:
    """The network of an ONNX file with the configuration that it carries; ONNX Runtime runs it.

    Raises:
        UserError: ONNX Runtime is missing; the file cannot be read, or `gcahng export` did not write it.
    """
    require("onnxruntime", extra="export", purpose=f"{path} is run")
    try:
        content = regular_file(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        session = OnnxNetwork(content)
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        raise UserError(f"{path} is not an ONNX file, or it is damaged ({str(error).splitlines()[0][:200]})") from None
    known = session.about()
    if known.get("format") != FORMAT:
        raise UserError(f"{path} was not written by gcahng export; its format is {known.get('format')!r}")
    config, step, digest = how_made(known, path)
    return Model(session.eval(), config, path, step, digest)


def how_made(about: Mapping[str, str], path: Path) -> tuple[TrainConfig, int | None, str | None]:
    """The config, the step and the digest of the data, as a model's file says them.

    Args:
        about: what the file says about itself.
        path: the file, for errors.

    Raises:
        UserError: the file does not say them.
    """
    try:
        known = json.loads(about["gcahng"])
        return config_of_run(known["config"]), known["step"], known["data_digest"]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} does not say how its network was made, or is damaged ({error})") from error


def _network(config: TrainConfig, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    try:
        check_fields(config.backbone, "backbone.")
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    network = build_backbone(config.backbone, pretrained=False)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the weights of {config.backbone.name}: {error}") from error
    return network.eval()
