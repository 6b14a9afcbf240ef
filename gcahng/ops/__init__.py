"""The ops that others may want to reuse: dense all-pairs edge updates, and the channel-wise mixing of negatives.

Each has every implementation (see gcahng.dispatch).
"""

from gcahng.engine.masks import EdgeDropout
from gcahng.ops.channel_mix import channel_mix
from gcahng.ops.edge_update import edge_update
from gcahng.ops.half_band import from_half_band, half_band_pairs, to_half_band
from gcahng.reference.edge_update import EdgeUpdateWeights

__all__ = [
    "EdgeDropout",
    "EdgeUpdateWeights",
    "channel_mix",
    "edge_update",
    "from_half_band",
    "half_band_pairs",
    "to_half_band",
]
