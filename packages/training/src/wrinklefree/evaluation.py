"""Held-out perplexity."""

import math
from collections.abc import Iterator

import torch
from bitnet_arch.bitlinear import constant_weights
from data_handler import PackedStream, collate
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.module import model_logits
from wrinklefree.objective import token_loss_sum

EVALUATION_ROWS = 8


def heldout_batches(stream: PackedStream) -> Iterator[dict[str, Tensor]]:
    """Yield the held-out rows in batches of eight."""
    rows = []
    for row in stream.rows():
        rows.append(row)
        if len(rows) == EVALUATION_ROWS:
            yield collate(rows)
            rows = []
    if rows:
        yield collate(rows)


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, stream: PackedStream) -> float:
    """Return the mean negative log-likelihood (nats a token) on a held-out stream, in the model's current lambda."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with constant_weights(model):
        for batch in heldout_batches(stream):
            batch = {key: value.to(model.device) for key, value in batch.items()}
            loss, tokens = token_loss_sum(model_logits(model, batch), batch["labels"])
            total, count = total + float(loss), count + int(tokens)
    model.train(was_training)
    return total / max(1, count)


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
