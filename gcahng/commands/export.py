"""gcahng export"""

from __future__ import annotations

import argparse

from gcahng.commands.arguments import Parser, SourcePath, TargetPath


def run(arguments: list[str]) -> int:
    """Write a trained network as ONNX or as a PyTorch program (.pt2): uint8 images in, embeddings out, any batch size.

    Its outputs are compared with the network's before the file is written.
    """
    parser = Parser(prog="gcahng export", description=run.__doc__)
    parser.add_argument(
        "model", action=SourcePath, metavar="MODEL", help="a run folder, a checkpoint or a .safetensors file"
    )
    parser.add_argument("out", action=TargetPath, metavar="OUT", help="the file to write, .onnx or .pt2")
    parser.add_argument("--which", choices=("last", "best"), default="last", help="checkpoint of a run folder (last)")
    parser.add_number("--opset", "ONNX operator set (the exporter's choice)", metavar="N")
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the outputs with the network's (yes)",
    )
    options = parser.parse_args(arguments)

    from gcahng.models.export import CHECKED_BATCHES, export_model
    from gcahng.models.model_file import load_model

    model = load_model(options.model, options.which)
    worst = export_model(model, options.out, opset=options.opset, check=options.check)
    if worst is not None:
        sizes = ", ".join(map(str, CHECKED_BATCHES))
        print(f"checked     outputs agree to {worst:.1e} of the largest one, at batch sizes {sizes}")
    print(f"written     {options.out}, from {model.path}")
    return 0
