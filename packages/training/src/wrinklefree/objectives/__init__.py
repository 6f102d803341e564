"""What a run minimises: objectives by name, one student forward and at most one teacher forward for all of them."""

from wrinklefree.objectives.base import Objective
from wrinklefree.objectives.diffusion import MaskedDiffusion, TargetScores
from wrinklefree.objectives.layerwise import Layerwise
from wrinklefree.objectives.manager import Losses, Objectives
from wrinklefree.objectives.relations import Relations
from wrinklefree.objectives.settings import KINDS, ObjectiveSettings, parse_objectives
from wrinklefree.objectives.tokens import CrossEntropy, LogitsDivergence

__all__ = [
    "KINDS",
    "CrossEntropy",
    "Layerwise",
    "LogitsDivergence",
    "Losses",
    "MaskedDiffusion",
    "Objective",
    "ObjectiveSettings",
    "Objectives",
    "Relations",
    "TargetScores",
    "parse_objectives",
]
