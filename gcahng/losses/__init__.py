"""The losses that a user calls."""

from gcahng.losses.gca_hng import GCAHNGLoss, Generated
from gcahng.losses.npair import npair_loss
from gcahng.losses.official import load_official_state_dict, official_state_dict
from gcahng.losses.options import EngineOptions

__all__ = ["EngineOptions", "GCAHNGLoss", "Generated", "load_official_state_dict", "npair_loss", "official_state_dict"]
