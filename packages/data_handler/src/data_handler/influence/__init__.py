"""Which training examples help a set of probes: TracIn, LESS, DataInf, influence distillation, and exact oracles.

Models come in as `nn.Module`; every score is positive where training on the example helps. Not imported by `import data_handler`.
"""

from data_handler.influence.datainf import datainf_scores
from data_handler.influence.distillation import jvp_embeddings, kernel_ridge, landmark_rows, landmark_scores
from data_handler.influence.estimate import Checkpoint, Estimate, InfluenceConfig, estimate, joined_moments
from data_handler.influence.exact import exact_scores, hessian_scores
from data_handler.influence.examples import ExampleSet, probe_examples, training_examples
from data_handler.influence.gradients import Collection, Gradients, Layer, PerSampleGradients, group_means
from data_handler.influence.layers import select_parameters
from data_handler.influence.less import AdamMoments, best_subtask, less_scores
from data_handler.influence.objectives import next_token_loss
from data_handler.influence.projection import Hadamard, Rademacher, make_projector, walsh_hadamard
from data_handler.influence.ranking import DomainScore, domain_scores, rank_correlation, write_table
from data_handler.influence.tracin import tracin_scores
from data_handler.influence.warmup import adam_warmup

__all__ = [
    "AdamMoments",
    "Checkpoint",
    "Collection",
    "DomainScore",
    "Estimate",
    "ExampleSet",
    "Gradients",
    "Hadamard",
    "InfluenceConfig",
    "Layer",
    "PerSampleGradients",
    "Rademacher",
    "adam_warmup",
    "best_subtask",
    "datainf_scores",
    "domain_scores",
    "estimate",
    "exact_scores",
    "group_means",
    "hessian_scores",
    "joined_moments",
    "jvp_embeddings",
    "kernel_ridge",
    "landmark_rows",
    "landmark_scores",
    "less_scores",
    "make_projector",
    "next_token_loss",
    "probe_examples",
    "rank_correlation",
    "select_parameters",
    "tracin_scores",
    "training_examples",
    "walsh_hadamard",
    "write_table",
]
