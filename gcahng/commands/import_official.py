"""gcahng import-official"""

from __future__ import annotations

import shlex
from typing import get_args

from gcahng.commands.arguments import Parser, SourcePath, TargetPath


def run(arguments: list[str]) -> int:
    """Convert a checkpoint of the authors' code, full or with the feature extractor alone, to a model of gcahng."""
    from gcahng.data.config import DataName

    sets = get_args(DataName)
    parser = Parser(prog="gcahng import-official", description=run.__doc__)
    parser.add_argument("file", action=SourcePath, metavar="FILE", help="the checkpoint, .pth or .safetensors")
    parser.add_argument("out", action=TargetPath, metavar="OUT", help="the model's file, .safetensors")
    # The names in gcahng.models.official.BACKBONES, which would import torch.
    parser.add_argument(
        "--backbone", choices=("googlenet", "resnet50", "dino"), required=True, help="the checkpoint's network"
    )
    parser.add_argument("--data", choices=sets, help="data set that it was trained on (the one with as many classes)")
    options = parser.parse_args(arguments)

    from gcahng.models.official import import_official
    from gcahng.models.pretrained import listed

    imported = import_official(options.file, options.out, options.backbone, options.data)
    print(f"network   {imported.config.backbone.name}, embedding_dim {imported.config.backbone.embedding_dim}")
    if imported.loss is not None:
        print(f"loss      {imported.config.gca.layers} layers, {imported.num_classes} training classes")
    if imported.left_out:
        print(f"left out  {len(imported.left_out)} tensors that nothing uses: {listed(list(imported.left_out), 4)}")
    print(f"written   {imported.model}")
    if imported.loss is not None:
        print(
            f"written   {imported.loss} (training starts from it with --gca.weights, from {imported.model} with "
            "--backbone.weights)"
        )
    model, data = shlex.quote(str(imported.model)), imported.config.data.name
    print(f"now       gcahng eval {model} --data.name {data} --data.root DIR")
    return 0
