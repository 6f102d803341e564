"""A float model trained on the spot, for a run that has no pretrained one: a stand-in."""

import torch
from bitnet_arch import UserError
from data_handler import BatchLoader, PackedStream
from transformers import PreTrainedModel

from wrinklefree.likelihood import next_token_loss
from wrinklefree.schedules import learning_rate_share

RATE = 2e-3


def train_float(model: PreTrainedModel, stream: PackedStream, *, steps: int, rows_per_step: int) -> float:
    """Train a float model in place on the first rows of a stream: AdamW, cosine schedule from 2e-3; return the last step's loss.

    Raises:
        UserError: if the loss is not finite.
    """
    optimizer = torch.optim.AdamW(model.train().parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    loss = float("nan")
    for step, batch in zip(range(steps), BatchLoader(stream, rows_per_step=rows_per_step), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = RATE * learning_rate_share("cosine", step, steps, round(0.05 * steps))
        total, count = next_token_loss(model, batch)
        mean = total / count.clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss = float(mean.detach())
    if not loss < float("inf"):
        raise UserError(
            "the teacher that is made on the spot did not learn (its loss is not finite): name one as teacher.model=DIR"
        )
    model.eval()
    return loss
