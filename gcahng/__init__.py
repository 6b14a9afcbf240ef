"""Hard negatives generated from the complete graph of a batch (GCA-HNG), exactly and in little memory.

What needs torch is imported when it is first used, so that `gcahng --help` and `gcahng --version` start at once.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from gcahng import installed as _installed
from gcahng.errors import UserError

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """A loss, or a module of the package, imported now."""
    if name in __all__:
        value = globals()[name] = getattr(_import_module("gcahng.losses"), name)
        return value
    if not name.startswith("_"):
        try:
            return _import_module(f"gcahng.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"gcahng.{name}":
                raise
    raise AttributeError(f"module 'gcahng' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})


_installed.say_once()
