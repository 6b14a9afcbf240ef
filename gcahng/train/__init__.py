"""Training of embedding networks: `fit` trains a `TrainConfig`, and `resume` continues a run."""

from gcahng.config import BackboneConfig, GcaConfig, OptimizerConfig, TrainConfig
from gcahng.data.config import DataConfig
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
