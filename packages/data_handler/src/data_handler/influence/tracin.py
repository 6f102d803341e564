"""TracIn over checkpoints (Pruthi et al., arXiv 2002.08484, equation 1: TracInCP)."""

from torch import Tensor

from data_handler.influence.gradients import Gradients


def tracin_scores(train: Gradients, targets: Tensor, rate: float = 1.0) -> Tensor:
    """Return one checkpoint's term η_c ⟨g_i, ḡ_t⟩; TracIn is the sum over checkpoints.

    Positive = helps: a small step against g_i lowers the target's loss by that much.

    Args:
        train: gradients of n examples.
        targets: mean gradient of each target, float32 [t, d].
        rate: learning rate η_c at the checkpoint.

    Returns:
        float32 [n, t].
    """
    return rate * train.times(targets)
