"""Losses of chosen positions, from what the head reads, a piece of positions at a time.

No `[tokens, vocabulary]` tensor outlives its piece: the backward pass computes a piece's logits again.
"""

from collections.abc import Callable

import torch
from bitnet_arch.attention import head_logits
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from wrinklefree.losses.pieces import PIECE_ELEMENTS, piece_rows


def log_probabilities(model: PreTrainedModel, hidden: Tensor, forbidden: int | None) -> Tensor:
    """Return log-probabilities float32 `[N, V]` of what the head reads, `[N, hidden]`; the token `forbidden` has probability 0."""
    logits = head_logits(model, hidden).float()
    if forbidden is not None and forbidden < logits.shape[-1]:
        logits = logits.index_fill(-1, torch.tensor(forbidden, device=logits.device), -torch.inf)
    return logits.log_softmax(-1)


def token_nll(
    model: PreTrainedModel, hidden: Tensor, targets: Tensor, forbidden: int | None = None, elements: int = PIECE_ELEMENTS
) -> Tensor:
    """Return each position's negative log-likelihood, float32 `[N]` in nats.

    Args:
        model: whose head is applied.
        hidden: `[N, hidden]`.
        targets: int64 `[N]`.
        forbidden: a token that is never predicted: the mask (MDLM's zero masking probability).
        elements: of a piece's logits.
    """

    def part(h: Tensor, y: Tensor) -> Tensor:
        return -log_probabilities(model, h, forbidden).gather(1, y[:, None])[:, 0]

    return _in_pieces(part, piece_rows(len(hidden), model.config.vocab_size, elements), hidden, targets)


def support_kl(
    model: PreTrainedModel,
    hidden: Tensor,
    ids: Tensor,
    log_target: Tensor,
    log_tail: Tensor,
    forbidden: int | None = None,
    elements: int = PIECE_ELEMENTS,
) -> Tensor:
    """Return KL(target || model) of each position, float32 `[N]` in nats, over K tokens and one bucket of all others.

    `support_losses` without the likelihood.
    """

    def part(h: Tensor, tokens: Tensor, target: Tensor, tail: Tensor) -> Tensor:
        return _support_divergence(log_probabilities(model, h, forbidden), tokens, target, tail)

    return _in_pieces(part, piece_rows(len(hidden), model.config.vocab_size, elements), hidden, ids, log_target, log_tail)


def support_losses(
    model: PreTrainedModel,
    hidden: Tensor,
    targets: Tensor,
    ids: Tensor,
    log_target: Tensor,
    log_tail: Tensor,
    forbidden: int | None = None,
    elements: int = PIECE_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Return KL(target || model) and the negative log-likelihood of each position, float32 `[N]` each in nats.

    Both are of the same logits, which exist once. The divergence is over K tokens and one bucket of all others.

    The model's log-probabilities are normalised over the whole vocabulary. Without the bucket, mass that the target leaves to the
    others would be pushed onto the K.

    Args:
        model: whose head is applied.
        hidden: `[N, hidden]`.
        targets: the tokens themselves, int64 `[N]`.
        ids: the K tokens, int64 `[N, K]`, different ones.
        log_target: their log-probabilities, float32 `[N, K]`.
        log_tail: that of all others together, float32 `[N]`; -inf where there is none.
        forbidden: a token that the model never predicts.
        elements: of a piece's logits.
    """

    def part(h: Tensor, y: Tensor, tokens: Tensor, target: Tensor, tail: Tensor) -> Tensor:
        log_p = log_probabilities(model, h, forbidden)
        return torch.stack([_support_divergence(log_p, tokens, target, tail), -log_p.gather(1, y[:, None])[:, 0]], dim=1)

    pieces = piece_rows(len(hidden), model.config.vocab_size, elements)
    divergence, nll = _in_pieces(part, pieces, hidden, targets, ids, log_target, log_tail).unbind(1)
    return divergence, nll


def _support_divergence(log_p: Tensor, tokens: Tensor, target: Tensor, tail: Tensor) -> Tensor:
    divergence = _term(target, log_p.gather(1, tokens)).sum(1)
    if bool(torch.isinf(tail).all()):
        return divergence
    return divergence + _term(tail, log_p.scatter(1, tokens, -torch.inf).logsumexp(1))


def _term(log_target: Tensor, log_p: Tensor) -> Tensor:
    """Return q (log q - log p), 0 where q is 0, whatever p is there."""
    present = log_target > -torch.inf
    safe = log_target.masked_fill(~present, 0.0)
    return torch.where(present, safe.exp() * (safe - log_p.masked_fill(~present, 0.0)), torch.zeros_like(log_p))


def _in_pieces(part: Callable[..., Tensor], pieces: list[slice], *tensors: Tensor) -> Tensor:
    """Apply `part` to rows of tensors, recomputing it in the backward pass, and join what it returns."""
    # Without rows there is one piece of none: the head is in the graph, so that all processes have a gradient of it.
    size = pieces[0].stop if pieces else 1
    rows = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.cat([checkpoint(part, *row, use_reentrant=False) for row in rows])
