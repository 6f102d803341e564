"""What an example's loss is. An objective sees one example without a batch dimension and must be `torch.func.vmap`-able."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data_handler.packing import IGNORED

Forward = Callable[..., Any]
"""The model as a function of its inputs, with the parameters already bound."""

Example = Mapping[str, Tensor]
Objective = Callable[[Forward, Example], Tensor]
"""`objective(forward, example) -> loss`, 0-dim."""


def next_token_loss(forward: Forward, example: Example) -> Tensor:
    """Return the mean next-token loss in nats of one example: any Hugging Face decoder.

    Args:
        forward: the model; called with `input_ids` [1, T], a float `attention_mask` [1, 1, T, T] and `position_ids` [1, T].
        example: `input_ids` and `labels`, int64 [T]; labels are unshifted, -100 = no loss. One document, padded on the right, so
            that the causal mask alone keeps padding out. An example without labels has loss 0.

    Returns:
        0-dim float32.
    """
    ids, labels = example["input_ids"], example["labels"]
    mask = causal_mask(ids.shape[-1], ids.device)
    positions = torch.arange(ids.shape[-1], device=ids.device)[None]
    logits = forward(input_ids=ids[None], attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
    targets = labels[1:]
    scored = targets != IGNORED
    losses = F.cross_entropy(logits[:-1].float(), torch.where(scored, targets, 0), reduction="none")
    return (losses * scored).sum() / scored.sum().clamp(min=1)


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Return a float mask [1, 1, T, T] to add to attention scores.

    It is given because a model that gets none makes its own by looking at its inputs, which `vmap` forbids; it is float because
    both SDPA and eager attention take that.
    """
    full = torch.full((length, length), torch.finfo(torch.float32).min, device=device)
    return full.triu(1)[None, None]
