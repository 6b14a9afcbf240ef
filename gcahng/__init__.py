"""Hard negatives generated from the complete graph of a batch (GCA-HNG), exactly and in little memory."""

from gcahng.errors import UserError
from gcahng.losses import (
    EngineOptions,
    GCAHNGLoss,
    Generated,
    load_official_state_dict,
    npair_loss,
    official_state_dict,
)

__version__ = "0.1.0"

__all__ = [
    "EngineOptions",
    "GCAHNGLoss",
    "Generated",
    "UserError",
    "__version__",
    "load_official_state_dict",
    "npair_loss",
    "official_state_dict",
]
