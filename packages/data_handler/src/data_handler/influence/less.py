"""LESS: the direction in which Adam would step for an example, against the targets' (Xia et al., arXiv 2402.04333, section 4)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data_handler.influence.gradients import Gradients, group_means

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class AdamMoments:
    """An Adam optimiser's state at a checkpoint, for the selected parameters, flattened and joined in their order.

    Attributes:
        first: m, float32 [d].
        second: v, float32 [d].
        beta1, beta2, eps: the optimiser's.
        step: how many steps it has taken.
    """

    first: Tensor
    second: Tensor
    beta1: float = BETA1
    beta2: float = BETA2
    eps: float = EPS
    step: int = 0

    def direction(self, gradients: Tensor) -> Tensor:
        """Return Γ = m̂ / sqrt(v̂ + ε), m̂ = β1 m + (1 - β1) g and v̂ = β2 v + (1 - β2) g², for gradients [b, d].

        ε is inside the root and there is no bias correction, as in the authors' code; both only rescale after normalisation, but
        for ε where v̂ is as small.
        """
        first = torch.lerp(gradients, self.first.to(gradients), self.beta1)
        second = torch.lerp(gradients.square(), self.second.to(gradients), self.beta2)
        return first / (second + self.eps).sqrt()

    def precondition(self, gradients: Tensor) -> Tensor:
        """Return a ⊙ g with Adam's diagonal preconditioner a = (1 - β1) / (1 - β1^(t+1)) / (sqrt(v̂ᵗ) + ε), for gradients [b, d].

        The part of Adam's step that depends on the example to first order (Influence Distillation, arXiv 2505.19051, section 3);
        v̂ᵗ = v / (1 - β2ᵗ).
        """
        second = self.second.to(gradients) / (1 - self.beta2 ** max(1, self.step))
        scale = (1 - self.beta1) / (1 - self.beta1 ** (self.step + 1))
        return gradients * (scale / (second.sqrt() + self.eps))


def less_scores(train: Gradients, probes: Gradients, groups: Tensor, count: int, rate: float = 1.0) -> Tensor:
    """Return one checkpoint's term η̄_c · mean over a subtask's probes of cos(Γ_i, g_probe); LESS is the sum over checkpoints.

    Positive = helps. `best_subtask` then takes the largest over subtasks.

    Args:
        train: Adam directions (`AdamMoments.direction`) of n examples, projected.
        probes: plain gradients of m probes, projected by the same projector.
        groups: each probe's subtask, int64 [m].
        count: subtasks.
        rate: the checkpoint's share of the learning rates, which sum to 1.

    Returns:
        float32 [n, count], in [-rate, rate].
    """
    targets = group_means(F.normalize(probes.values, dim=1), groups, count)
    norms = train.squared_norms().sum(1, keepdim=True).sqrt()
    return rate * train.times(targets) / norms.clamp(min=1e-12)


def best_subtask(scores: Tensor) -> Tensor:
    """Return an example's score for a task of several subtasks: the largest, [n, t] -> [n]."""
    return scores.amax(1)
