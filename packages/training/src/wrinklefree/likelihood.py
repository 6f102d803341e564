"""How likely a model finds the texts of a batch."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.losses.divergence import cross_entropy
from wrinklefree.losses.head import head_losses
from wrinklefree.losses.pieces import PIECE_ELEMENTS
from wrinklefree.objective import IGNORED
from wrinklefree.views import Batch, Head, Needs, forward_views


def next_token_loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the summed next-token cross-entropy and the number of tokens it was summed over.

    `wrinklefree.objective.token_loss_sum` of the model's logits, which exist for a piece of the tokens at a time; with gradients.

    Args:
        model: any family of `bitnet_arch.families`.
        batch: `input_ids`, `labels` (-100 where nothing is scored), `position_ids` and `document_ids`, int64 `[B, T]`.

    Returns:
        A float32 scalar in nats and an int64 scalar.
    """
    states, targets = forward_views(model, batch, Needs(logits=True)).last[:, :-1], batch["labels"][:, 1:]
    scored = targets != IGNORED
    head, chosen = Head(model), targets[scored]
    loss, _ = head_losses(
        states[scored],
        head,
        head.parameters,
        [lambda logits, part: cross_entropy(logits, chosen[part])],
        torch.ones(1, device=states.device),
        vocabulary=head.vocabulary,
        elements=PIECE_ELEMENTS,
    )
    return loss, scored.sum()
