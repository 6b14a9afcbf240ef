"""Training and evaluation of embedding networks."""

from gcahng.train.config import BackboneConfig, DataConfig, GcaConfig, OptimizerConfig, TrainConfig
from gcahng.train.loop import TrainingInterrupted, fit

__all__ = [
    "BackboneConfig",
    "DataConfig",
    "GcaConfig",
    "OptimizerConfig",
    "TrainConfig",
    "TrainingInterrupted",
    "fit",
]
