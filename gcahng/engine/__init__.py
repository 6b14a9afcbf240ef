"""The edge engine: the graph of a batch in tiles, between matrix products only fused stages, nothing quadratic held
by accident.

schedule: which tile covers which pairs. nodes: what is n x D, by autograd. stages: what happens to a tile's edges, per
implementation. graph: the sweeps over all tiles. passes: the two passes of a training step. functions: how torch sees
them.
"""
