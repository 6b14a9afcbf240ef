"""gcahng import-official"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import get_args

from gcahng.commands.arguments import Parser


def run(arguments: list[str]) -> int:
    """Make a model of gcahng from a checkpoint of the authors' code, full or with the feature extractor alone."""
    from gcahng.data.config import DataName

    sets = get_args(DataName)
    parser = Parser(prog="gcahng import-official", description=run.__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="the checkpoint, .pth or .safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="the model's file, .safetensors")
    # As in gcahng.models.official.BACKBONES, which imports torch.
    parser.add_argument("--backbone", choices=("googlenet", "resnet50", "dino"), required=True, help="its network")
    parser.add_argument("--data", choices=sets, help="what it was trained on (by its number of classes)")
    options = parser.parse_args(arguments)

    from gcahng.models.official import import_official
    from gcahng.models.pretrained import listed

    found = import_official(options.file, options.out, options.backbone, options.data)
    print(f"network   {found.config.backbone.name}, embedding_dim {found.config.backbone.embedding_dim}")
    if found.loss is not None:
        print(f"loss      {found.config.gca.layers} layers, {found.num_classes} training classes")
    if found.left_out:
        print(f"left out  {len(found.left_out)} tensors that nothing uses: {listed(list(found.left_out), 4)}")
    print(f"written   {found.model}")
    if found.loss is not None:
        print(f"written   {found.loss} (--gca.weights starts training from it, --backbone.weights from {found.model})")
    print(f"now       gcahng eval {shlex.quote(str(found.model))} --data.name {found.config.data.name} --data.root DIR")
    return 0
