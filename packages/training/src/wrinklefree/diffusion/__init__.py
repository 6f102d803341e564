"""Training of diffusion language models, and their distillation from autoregressive ones (docs/diffusion.md)."""

from wrinklefree.diffusion.settings import METHODS, DiffusionSettings
from wrinklefree.diffusion.step import diffusion_bound, diffusion_step, scored_count
from wrinklefree.diffusion.tcs_step import TCSSettings, tcs_step

__all__ = [
    "METHODS",
    "DiffusionSettings",
    "TCSSettings",
    "diffusion_bound",
    "diffusion_step",
    "scored_count",
    "tcs_step",
]
