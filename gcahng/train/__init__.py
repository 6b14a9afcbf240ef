"""Training and evaluation of embedding networks."""

from gcahng.config import BackboneConfig, DataConfig, GcaConfig, OptimizerConfig, TrainConfig
from gcahng.train.finite import NonFinite
from gcahng.train.loop import fit, resume
from gcahng.train.session import TrainingInterrupted

__all__ = [
    "BackboneConfig",
    "DataConfig",
    "GcaConfig",
    "NonFinite",
    "OptimizerConfig",
    "TrainConfig",
    "TrainingInterrupted",
    "fit",
    "resume",
]
