"""The language-modelling loss as a pure function."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def token_loss_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed next-token cross-entropy and the number of tokens it was summed over.

    A sum, not a mean: micro-batches and processes hold different numbers of tokens, and only sums add up to the loss of the
    whole step.

    Args:
        logits: float `[B, T, V]`.
        labels: int64 `[B, T]`, unshifted; -100 where no prediction is scored.

    Returns:
        A float32 scalar in nats and an int64 scalar. The first position of a row is never scored.
    """
    targets = labels[:, 1:].reshape(-1)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")
    return loss, (targets != IGNORED).sum()


def scored_tokens(labels: Tensor) -> Tensor:
    """Return how many positions of `labels` `[B, T]` are scored by `token_loss_sum` (int64 scalar)."""
    return (labels[:, 1:] != IGNORED).sum().to(torch.int64)
