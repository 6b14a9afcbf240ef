"""The data set that a configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gcahng.data.glyphs import load_glyphs
from gcahng.data.image_set import DataSplits

if TYPE_CHECKING:
    from gcahng.train.config import DataConfig


def load_data(config: DataConfig) -> DataSplits:
    """The splits of `config.name`.

    Raises:
        UserError: files that are missing or not as the data set has them; an option that does not fit it.
    """
    return load_glyphs(config.train_classes, 100 if config.val_classes is None else config.val_classes)
