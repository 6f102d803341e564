"""Divergences between a teacher's and a student's distributions of the next token, row by row."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from wrinklefree.objective import IGNORED

Direction = Literal["forward", "reverse"]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each row's cross-entropy in nats, `[N]`, 0 where the target is -100.

    Args:
        logits: float `[N, V]`.
        targets: int64 `[N]`.
    """
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, direction: Direction = "forward") -> Tensor:
    """Return each row's KL divergence between the softmaxes at a temperature, in nats, float `[N]`.

    "forward" is KL(teacher || student), which BitDistill takes (arXiv 2510.13998, L_LD); "reverse" is KL(student || teacher). The
    gradient of the student's logits shrinks with the square of the temperature (Hinton et al. 2015); whoever wants that undone
    multiplies by its square.

    Args:
        student: logits, float `[N, V]`.
        teacher: logits, float `[N, V]`.
        temperature: what logits are divided by.
        direction: which of the two is the reference.
    """
    log_s = F.log_softmax(student / temperature, dim=-1)
    log_t = F.log_softmax(teacher / temperature, dim=-1)
    if direction == "reverse":
        log_s, log_t = log_t, log_s
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)


def top_log_probabilities(teacher: Tensor, top_k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest log-probabilities of each row at a temperature, and what is left for all other tokens.

    Args:
        teacher: logits, float `[N, V]`.
        top_k: how many, at most V.
        temperature: what logits are divided by.

    Returns:
        Log-probabilities, float `[N, k]`, largest first; their tokens, int64 `[N, k]`; and the logarithm of the mass of all
        others, float `[N]`, summed over them: 1 minus the mass of k tokens has no digits left where a teacher is sure.
    """
    scaled = teacher / temperature
    values, tokens = scaled.topk(top_k, dim=-1)
    normaliser = scaled.logsumexp(-1, keepdim=True)
    rest = scaled.scatter(-1, tokens, -torch.inf).logsumexp(-1) - normaliser[:, 0]
    return values - normaliser, tokens, rest


def top_k_divergence(
    student: Tensor,
    log_probabilities: Tensor,
    tokens: Tensor,
    rest: Tensor | None = None,
    temperature: float = 1.0,
    direction: Direction = "forward",
) -> Tensor:
    """Return each row's KL divergence over k tokens of the teacher's and one bucket for all others, in nats, float `[N]`.

    The bucket makes it a divergence of two distributions: without it the student could put mass elsewhere for nothing. It is at
    most the divergence over the whole vocabulary, and equals it for k = V - 1 or V.

    Args:
        student: logits, float `[N, V]`.
        log_probabilities: the teacher's, at the same temperature, float `[N, k]`; -inf where a row has fewer tokens.
        tokens: int64 `[N, k]`, distinct in a row (any, where the log-probability is -inf).
        rest: the logarithm of the teacher's mass of all other tokens, float `[N]`. None takes 1 minus the mass of the k, which
            rounding makes unknown below the type's epsilon: "reverse" then counts at least that (float32: -15.9), and falls
            short of the divergence of a teacher that leaves less.
        temperature: what the student's logits are divided by.
        direction: "forward" is KL(teacher || student).
    """
    absent = log_probabilities == -torch.inf
    scaled = student / temperature
    normaliser = scaled.logsumexp(-1, keepdim=True)
    log_s = scaled.gather(-1, tokens) - normaliser
    spare = scaled.shape[-1]  # a column for what is absent
    inside = scaled.new_zeros(len(scaled), spare + 1, dtype=torch.bool)
    inside = inside.scatter_(-1, tokens.masked_fill(absent, spare), True)[:, :-1]
    rest_s = scaled.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True) - normaliser
    if rest is None:
        rest_t = torch.log1p(-log_probabilities.exp().sum(-1, keepdim=True).clamp(max=1.0))
        if direction == "reverse":
            rest_t = rest_t.clamp(min=math.log(torch.finfo(rest_t.dtype).eps))
    else:
        rest_t = rest[:, None]
    log_s = torch.cat([log_s.masked_fill(absent, -torch.inf), rest_s], dim=-1)
    log_t = torch.cat([log_probabilities, rest_t], dim=-1)
    if direction == "reverse":
        log_s, log_t = log_t, log_s
        log_s = log_s.clamp(min=-100.0)  # mass where the teacher has none at all costs much, not infinitely much
    gap = torch.where(log_t == -torch.inf, torch.zeros_like(log_t), log_t - log_s)
    return (log_t.exp() * gap).sum(-1)
