"""Recipes: the complete options of training runs by name, for `gcahng train --config NAME`."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from gcahng.errors import UserError
from gcahng.extras import require

if TYPE_CHECKING:
    from gcahng.config import TrainConfig

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find(name: str) -> Path:
    """The YAML file of a recipe.

    Raises:
        UserError: there is no recipe of that name; the message suggests the closest names.
    """
    path = _FOLDER / f"{name}.yaml"
    if name in names():
        return path
    close = get_close_matches(name, names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "gcahng recipes lists them"
    raise UserError(f"{name} is neither a file nor a recipe; {hint}")


def load(name: str) -> TrainConfig:
    """The options of a recipe; data.root is not among them.

    Raises:
        UserError: there is no recipe of that name.
    """
    path = find(name)
    require("yaml", extra="train", purpose="recipes are YAML")
    from gcahng.config import config_from_dict
    from gcahng.yaml_files import load_yaml, read_yaml

    return config_from_dict(load_yaml(read_yaml(path, name), name))
