"""The losses that a user calls."""

from gcahng.losses.gca_hng import GCAHNGLoss
from gcahng.losses.generated import Generated
from gcahng.losses.npair import npair_loss
from gcahng.losses.official import load_official_state_dict, official_state_dict
from gcahng.losses.options import EngineOptions
from gcahng.losses.synthetic import SyntheticOptions

__all__ = [
    "EngineOptions",
    "GCAHNGLoss",
    "Generated",
    "SyntheticOptions",
    "load_official_state_dict",
    "npair_loss",
    "official_state_dict",
]
