"""Trains 1.58-bit language models: `python -m wrinklefree`, or `wrinklefree.run.train` from Python."""

from wrinklefree.config import DistributedConfig, ModelConfig, RunConfig, ShapeConfig, TrainingConfig

__all__ = ["DistributedConfig", "ModelConfig", "RunConfig", "ShapeConfig", "TrainingConfig"]
