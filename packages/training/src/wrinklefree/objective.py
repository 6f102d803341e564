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


def domain_sums(values: Tensor, owner: Tensor, domains: int) -> Tensor:
    """Return the sums of the rows of each domain, `[K]`, of `values`' type.

    Args:
        values: one a row, `[B]`.
        owner: the domain of each row, int64 `[B]`.
        domains: K.
    """
    # Not index_add_: on a GPU it adds floats in no fixed order, and a resumed run would differ in the last bit.
    masks = owner[None, :] == torch.arange(domains, device=owner.device)[:, None]
    return torch.where(masks, values[None, :], torch.zeros_like(values)).sum(dim=1)


def domain_means(sums: Tensor, counts: Tensor) -> list[float]:
    """Return sums over counts, not a number where there was nothing, [K]."""
    return [float(s) / int(n) if n else float("nan") for s, n in zip(sums, counts, strict=True)]
