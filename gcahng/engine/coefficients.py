"""The coefficients of a whole batch, which training never holds: what `generate` returns."""

from __future__ import annotations

import torch
from torch import Tensor

from gcahng.engine.graph import GraphPass


def coefficients(graph: GraphPass) -> Tensor:
    """Runs the graph network and forms the coefficients of every ordered pair.

    Args:
        graph: a pass that has not run yet.

    Returns:
        θ (n, n, D), in canonical order.
    """
    schedule = graph.schedule
    graph.forward()
    classes, views = schedule.classes, schedule.views
    out = schedule.room(graph.z, classes, views, classes, views, graph.dim)
    for tile in schedule.tiles:
        theta = graph.stages.context.full(graph.coefficients(graph.edge(graph.layers, tile)))
        grid = theta.view(*schedule.shape(tile), -1)
        first = torch.arange(tile.first_class, tile.first_class + tile.classes, device=out.device)[:, None]
        columns = schedule.column_classes(tile, out.device)
        # Two index tensors apart put their dimensions first: (A, O, K, K, D).
        out[first, :, columns] = grid.permute(0, 2, 1, 3, 4)
        if tile.mirrored < tile.offsets:
            skip = tile.mirrored
            out[columns[:, skip:], :, first] = grid[:, :, skip:].permute(0, 2, 3, 1, 4)
    schedule.complete(out)
    return out.view(schedule.nodes, schedule.nodes, -1)
