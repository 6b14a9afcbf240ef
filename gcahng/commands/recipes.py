"""gcahng recipes"""

from __future__ import annotations

from gcahng.commands.arguments import Parser


def run(arguments: list[str]) -> int:
    """List the recipes; gcahng train --config NAME --data.root DIR runs one."""
    Parser(prog="gcahng recipes", description=run.__doc__).parse_args(arguments)
    from gcahng import recipes

    head = ("recipe", "network", "D", "n = C x K", "L", "H", "lr", "graph lr", "epochs")
    rows = [head]
    for name in recipes.names():
        config = recipes.load(name)
        data, gca = config.data, config.gca
        batch = (
            f"{data.classes_per_batch * data.samples_per_class} = {data.classes_per_batch} x {data.samples_per_class}"
        )
        sizes = (config.backbone.embedding_dim, batch, gca.layers, gca.heads)
        rates = (f"{config.optimizer.lr:g}", f"{gca.graph_lr:g}")
        rows.append((name, config.backbone.name, *map(str, sizes), *rates, str(config.epochs)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
