"""Mixture optimisation: how much of each domain a run should read.

Online methods are `MixtureController`s that a trainer drives; offline ones (`offline`) train proxies and end with weights.
"""

from data_handler.mixture.aioli import Aioli
from data_handler.mixture.controller import Controller, MixtureController, Observation, Static, Stratified
from data_handler.mixture.doremi import DoReMi
from data_handler.mixture.driver import Learner, Run, StepResult, drive
from data_handler.mixture.influence import InfluenceWeighted, influence_weights, mean_influence
from data_handler.mixture.odm import OnlineDataMixing
from data_handler.mixture.output import config_yaml, with_weights, write_config
from data_handler.mixture.settings import CONTROLLERS, MixtureConfig, parse_mixture
from data_handler.mixture.simplex import bounded, normalised, simplex_grid

__all__ = [
    "CONTROLLERS",
    "Aioli",
    "Controller",
    "DoReMi",
    "InfluenceWeighted",
    "Learner",
    "MixtureConfig",
    "MixtureController",
    "Observation",
    "OnlineDataMixing",
    "Run",
    "Static",
    "StepResult",
    "Stratified",
    "bounded",
    "config_yaml",
    "drive",
    "influence_weights",
    "mean_influence",
    "normalised",
    "parse_mixture",
    "simplex_grid",
    "with_weights",
    "write_config",
]
