"""The configuration groups as frozen dataclasses; Hydra is only the surface that fills them.

Types and keys are checked by pydantic, so that a wrong one ends in a sentence that names it; values here, a file a group.
"""

from wrinklefree.config.distributed import DistributedConfig
from wrinklefree.config.mixture import MixtureConfig
from wrinklefree.config.model import ModelConfig, ShapeConfig
from wrinklefree.config.run import RunConfig
from wrinklefree.config.training import TrainingConfig
from wrinklefree.mapping import from_mapping

__all__ = ["DistributedConfig", "MixtureConfig", "ModelConfig", "RunConfig", "ShapeConfig", "TrainingConfig", "from_mapping"]
