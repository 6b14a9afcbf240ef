"""gcahng embed"""

from __future__ import annotations

from gcahng.commands.arguments import Parser, SourcePath, TargetPath
from gcahng.commands.image_options import add_image_options, add_stream_options, embed_sources
from gcahng.launch import launched
from gcahng.machine import keep_freed_memory


def run(arguments: list[str]) -> int:
    """Embed images and write the embeddings with their paths and labels.

    Without SOURCE it embeds the test split of the model's data set, or what --data and --split say. If it is stopped,
    the same command continues where it was.
    """
    parser = Parser(prog="gcahng embed", description=run.__doc__)
    parser.add_argument(
        "model", action=SourcePath, metavar="MODEL", help="a run folder, a checkpoint or a .safetensors file"
    )
    parser.add_argument(
        "sources",
        action=SourcePath,
        nargs="*",
        metavar="SOURCE",
        help="image files, folders, or .txt lists with one path in each line",
    )
    parser.add_argument(
        "--out",
        action=TargetPath,
        required=True,
        metavar="FILE",
        help="X.safetensors, X.parquet, or X.npy (with X.csv and X.json)",
    )
    parser.add_argument("--normalize", action="store_true", help="scale every embedding to norm 1")
    add_stream_options(parser)
    add_image_options(parser)
    options = parser.parse_intermixed_args(arguments)

    from gcahng.models.model_file import load_model
    from gcahng.retrieval.embeddings import check_suffix

    keep_freed_memory()
    check_suffix("--out", options.out)
    model = load_model(options.model, options.which)
    embedded = embed_sources(options, model, options.sources, options.out, normalize=options.normalize)
    if launched().rank:  # the first process prints for all
        return 0
    rows, dim = embedded.embeddings.shape
    classes = f", {len(embedded.items.class_names)} classes" if embedded.items.labeled else ", without labels"
    print(f"{rows} embeddings of {dim} channels{', normalized' if options.normalize else ''}{classes}")
    print(f"written     {options.out}")
    return 0
