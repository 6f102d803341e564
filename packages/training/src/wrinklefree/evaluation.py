"""Held-out losses and gradients."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

import torch
from bitnet_arch.bitlinear import constant_weights
from bitnet_arch.diffusion import diffusion_of
from data_handler import PackedStream, collate
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.diffusion import DiffusionSettings, diffusion_bound
from wrinklefree.likelihood import next_token_loss
from wrinklefree.views import Batch

EVALUATION_ROWS = 8
INFLUENCE_ROWS = 8
"""Rows that a domain would give next; their gradient stands for the domain."""


def in_batches(rows: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield rows in batches of eight, on a device."""
    kept = []
    for row in rows:
        kept.append(row)
        if len(kept) == EVALUATION_ROWS:
            yield {key: value.to(device) for key, value in collate(kept).items()}
            kept = []
    if kept:
        yield {key: value.to(device) for key, value in collate(kept).items()}


def heldout_loss(model: PreTrainedModel, stream: PackedStream) -> float:
    """Return the mean negative log-likelihood (nats a token) on a held-out stream, in the model's current lambda.

    Of a diffusion model, what `wrinklefree.diffusion.diffusion_bound` measures, with the same masks every time.
    """
    form = diffusion_of(model.config)
    if form is not None:
        rows = ({**row, "sample_index": torch.tensor(i)} for i, row in enumerate(stream.rows()))
        return diffusion_bound(model, in_batches(rows, model.device), DiffusionSettings(**asdict(form)))
    return mean_loss(model, stream.rows())


def rows_by_domain(stream: PackedStream) -> list[list[Batch]]:
    """Return the rows of a held-out stream by source, [K]."""
    rows: list[list[Batch]] = [[] for _ in stream.domains]
    for row in stream.rows():
        rows[int(row["domain"])].append(row)
    return rows


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: Iterable[Batch]) -> float:
    """Return the mean negative log-likelihood (nats a token) of rows, in the model's current lambda."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with constant_weights(model):
        for batch in in_batches(rows, model.device):
            loss, tokens = next_token_loss(model, batch)
            total, count = total + float(loss), count + int(tokens)
    model.train(was_training)
    return total / max(1, count)


def mean_gradient(model: PreTrainedModel, rows: Iterable[Batch]) -> Tensor:
    """Return the gradient of the rows' mean loss in all trained parameters, laid end to end, float [P]; they keep none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    was_training, count = model.training, 0
    model.eval()
    for batch in in_batches(rows, model.device):
        loss, tokens = next_token_loss(model, batch)
        count += int(tokens)
        for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            sum_ += gradient
    model.train(was_training)
    return torch.cat([g.flatten() for g in total]) / max(1, count)


def first_order_influence(
    model: PreTrainedModel, train: Iterable[Sequence[Batch]], probes: Iterable[Sequence[Batch]]
) -> list[list[float]]:
    """Return <training gradient of a domain, gradient of a probe>: what a small step on one takes off the other's loss.

    TracIn's first-order product (Pruthi et al. 2020) for plain gradient descent, in units of its rate. One gradient a probe and one
    more are in memory.

    Args:
        model: in its current lambda.
        train: rows of each of K domains.
        probes: rows of each of P probes.

    Returns:
        [K][P], positive = helps.
    """
    towards = [mean_gradient(model, rows) for rows in probes]
    return [[float(gradient @ probe) for probe in towards] for gradient in (mean_gradient(model, rows) for rows in train)]


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
