"""Checkpoints of the authors' code as models of gcahng."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gcahng import recipes
from gcahng.config import TrainConfig
from gcahng.data.config import DataName
from gcahng.errors import UserError
from gcahng.files import atomic_write, writing
from gcahng.losses import GCAHNGLoss
from gcahng.losses.official import official_state_dict
from gcahng.models.backbones import build_backbone
from gcahng.models.model_file import save_model
from gcahng.models.pretrained import check_names, read_tensors
from gcahng.paths import check_target

_EXTRACTOR, _HEAD = "feature_extractor.", "feature_extractor.fc."
_CLASSIFIER = "softmax_classifier."


@dataclass(frozen=True)
class _Names:
    """How the authors' names of a network differ from ours.

    Attributes:
        body: the prefix of the names of torchvision or timm.
        unused: what may follow it in their files and is never used.
        mark: a name that no other network has.
    """

    body: str
    unused: tuple[str, ...]
    mark: str

    def theirs(self, ours: str) -> str:
        """The authors' name of a tensor of our network."""
        part, _, rest = ours.partition(".")
        return f"{_HEAD}{rest}" if part == "head" else f"{self.body}{rest}"


_BODY = f"{_EXTRACTOR}backbone."
BACKBONES = {
    "googlenet": _Names(_BODY, ("fc.", "aux1.", "aux2."), f"{_BODY}inception3a.branch1.conv.weight"),
    "resnet50": _Names(f"{_BODY}model.", ("fc.",), f"{_BODY}model.layer1.0.conv1.weight"),
    "dino": _Names(_BODY, (), f"{_BODY}cls_token"),
}
# The number of training classes tells the authors' data set.
_DATA_OF_CLASSES: dict[int, DataName] = {100: "cub200", 98: "cars196", 11318: "sop", 3997: "inshop"}


@dataclass(frozen=True)
class Imported:
    """What an import wrote.

    Attributes:
        model: the network's file.
        loss: the file of the graph network and the classifier; None: the checkpoint has none.
        config: the config in the model's file, which is the recipe's with the sizes of the checkpoint.
        num_classes: the number of training classes; None where there is no classifier.
        left_out: the names in the checkpoint that nothing uses.
    """

    model: Path
    loss: Path | None
    config: TrainConfig
    num_classes: int | None
    left_out: tuple[str, ...]


def import_official(source: Path, out: Path, backbone: str, data: DataName | None = None) -> Imported:
    """Convert a checkpoint of the authors' code; the same as `gcahng import-official`.

    A full checkpoint (feature_extractor, gnn, softmax_classifier) becomes the network `out` and the generator's weights
    OUT.loss.safetensors, which training starts from with gca.weights. A checkpoint of the feature extractor alone, with
    or without that prefix, becomes the network.

    Args:
        source: a .pth or .safetensors file, which is read without running any code of it.
        out: the .safetensors file to write.
        backbone: googlenet, resnet50 or dino.
        data: the data set that it was trained on, for the options in the file; None: the number of classes tells.

    Returns:
        What was written.

    Raises:
        UserError: an argument is wrong, the file cannot be read, or its names or shapes do not fit (they are listed),
            and nothing is written; or a file cannot be written.
    """
    if backbone not in BACKBONES:
        raise UserError(f"backbone is {backbone!r}; it must be one of {', '.join(BACKBONES)}")
    if out.suffix != ".safetensors":
        raise UserError(f"OUT is {out}; it must end in .safetensors")
    check_target("OUT", out)
    if not out.parent.is_dir():
        raise UserError(f"OUT is {out}, and there is no folder {out.parent}; it must lie in an existing folder")
    names = BACKBONES[backbone]
    given = _with_prefix(read_tensors(source))
    _check_backbone(given, backbone, source)
    has_generator = any(name.startswith("gnn.") for name in given)
    unused = tuple(names.body + name for name in names.unused) + (() if has_generator else (_CLASSIFIER,))
    left_out = tuple(name for name in given if name.startswith(unused))
    given = {name: tensor for name, tensor in given.items() if name not in left_out}

    config, num_classes = _config(given, backbone, data)
    network = build_backbone(config.backbone, pretrained=False)
    state = network.state_dict()
    wanted = {names.theirs(name): tensor for name, tensor in state.items()}
    generator = _generator(config, num_classes) if has_generator else {}
    check_names({**wanted, **generator}, given, str(source), f"the authors' {backbone}")
    network.load_state_dict({name: given.get(names.theirs(name), tensor) for name, tensor in state.items()})

    with writing(out):
        save_model(out, network.state_dict(), config)
    loss = None
    if has_generator:
        loss = out.with_suffix(".loss.safetensors")
        with writing(loss):
            _save(loss, {name: _as(tensor, given.get(name)) for name, tensor in generator.items()})
    return Imported(out, loss, config, num_classes if has_generator else None, left_out)


def _with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names in a full checkpoint, where the feature extractor alone was saved too."""
    bare = not any(name.startswith(_EXTRACTOR) for name in tensors)
    return {
        f"{_EXTRACTOR}{name}" if bare and name.startswith(("backbone.", "fc.")) else name: tensor
        for name, tensor in tensors.items()
    }


def _check_backbone(given: Mapping[str, Tensor], backbone: str, source: Path) -> None:
    """See that the file is not of another of the three networks: one line instead of hundreds of names.

    Raises:
        UserError: it is.
    """
    held = [name for name, names in BACKBONES.items() if names.mark in given]
    if held and backbone not in held:
        raise UserError(f"backbone is {backbone!r} and {source} holds the authors' {held[0]}; it must be {held[0]!r}")


def _config(given: Mapping[str, Tensor], backbone: str, data: DataName | None) -> tuple[TrainConfig, int]:
    """The recipe's options with the file's sizes, and the number of training classes (0: no classifier)."""
    num_classes = _rows(given, f"{_CLASSIFIER}weight", 0)
    known = data or _DATA_OF_CLASSES.get(num_classes)
    recipe = f"{backbone}_{known}"
    config = recipes.load(recipe if recipe in recipes.names() else f"{backbone}_cub200")
    layers = len({name.split(".")[2] for name in given if name.startswith("gnn.gnn.")}) or config.gca.layers
    dim = _rows(given, f"{_HEAD}1.weight", config.backbone.embedding_dim)
    # Where the set is not known, the user names it with gcahng eval --data.name.
    config = replace(
        config,
        data=replace(config.data, name=known or "folder"),
        backbone=replace(config.backbone, embedding_dim=dim),
        gca=replace(config.gca, layers=layers),
    )
    return config, num_classes


def _rows(given: Mapping[str, Tensor], name: str, default: int) -> int:
    return given[name].shape[0] if name in given and given[name].ndim == 2 else default


def _generator(config: TrainConfig, num_classes: int) -> dict[str, Tensor]:
    """The names and shapes of the graph network and the classifier, on the meta device."""
    with torch.device("meta"):
        loss = GCAHNGLoss(max(num_classes, 1), config.backbone.embedding_dim, layers=config.gca.layers, heads=1, seed=0)
    return official_state_dict(loss)


def _as(wanted: Tensor, given: Tensor | None) -> Tensor:
    """A tensor in the generator's dtype; an old file may lack BatchNorm's count of batches, which is then 0."""
    return torch.zeros((), dtype=wanted.dtype) if given is None else given.to(wanted.dtype).contiguous()


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    content = save(tensors)
    atomic_write(path, lambda file: file.write(content))
