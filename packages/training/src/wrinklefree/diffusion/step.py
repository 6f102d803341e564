"""One step's losses of a diffusion model: masked views, one forward, the loss of the masked tokens.

A sum, not a mean, over what `scored_count` counts: micro-batches and processes hold different numbers of tokens.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from bitnet_arch import UserError
from bitnet_arch.attention import attention_argument, hidden_states
from bitnet_arch.bitlinear import constant_weights
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.diffusion.loss import token_nll
from wrinklefree.diffusion.mask import noisy_clean_mask, whole_mask
from wrinklefree.diffusion.settings import DiffusionSettings
from wrinklefree.diffusion.views import Views, make_views, maskable

Batch = dict[str, Tensor]


def view_states(model: PreTrainedModel, batch: Batch, views: Views, settings: DiffusionSettings) -> Tensor:
    """Return what the head reads at every position of every view, `[V B, T, hidden]`.

    With blocks, the decoder reads [noisy | clean], `[V B, 2T]`, both halves at the same positions, and the noisy half's states are
    returned. Deviation: none from the papers' layout; both views carry the clean half.
    """
    documents, positions = batch["document_ids"], batch["position_ids"]
    if settings.block_size is None:
        ids, at, allowed = views.input_ids, positions, whole_mask(documents)
    else:
        ids = torch.cat([views.input_ids, batch["input_ids"].repeat(views.count, 1)], dim=1)
        at, allowed = positions.repeat(1, 2), noisy_clean_mask(views.blocks, documents)
    at, allowed = at.repeat(views.count, 1), allowed.repeat(views.count, 1, 1)
    mask = attention_argument(model, allowed, at, at)
    states = hidden_states(model, input_ids=ids, attention_mask=mask, position_ids=at, use_cache=False)
    return states[:, : views.input_ids.shape[1]]


def masked_states(states: Tensor, views: Views, settings: DiffusionSettings) -> Tensor:
    """Return the states that predict the masked tokens, `[N, hidden]`, in the order of `views.masked`.

    With token shift, token i is read from position i - 1. A row's first position has none before it: it must not be masked.
    """
    if not settings.token_shift:
        return states[views.masked]
    return states[:, :-1][views.masked[:, 1:]]


def check_masked(batch: Batch, views: Views, settings: DiffusionSettings) -> None:
    """Refuse rows that no such model can be trained on.

    Raises:
        UserError: if a text contains the mask token, or a document's first token is to be predicted from the one before it.
    """
    if bool((batch["input_ids"] == settings.mask_token_id).any()):
        raise UserError(
            f"the data contains the mask token (number {settings.mask_token_id}), which stands for what is to be predicted: "
            "take it out of the texts"
        )
    if settings.token_shift and bool(views.masked[:, 0].any()):
        raise UserError("the first token of a row has a label, and token shift reads it from the token before: give it none")


def diffusion_step(model: PreTrainedModel, batch: Batch, settings: DiffusionSettings) -> dict[str, Tensor]:
    """Return the losses of a batch by name, float32 scalars: "dlm", summed over its tokens, in nats.

    Args:
        model: the decoder, with a mask token.
        batch: as in `make_views`.
        settings: how it is trained.

    Raises:
        UserError: for rows that it cannot be trained on.
    """
    views = make_views(batch, settings)
    check_masked(batch, views, settings)
    states = masked_states(view_states(model, batch, views, settings), views, settings)
    targets = batch["input_ids"].repeat(views.count, 1)[views.masked]
    nll = token_nll(model, states, targets, settings.mask_token_id)
    return {"dlm": (nll * views.weights[views.masked]).sum()}


def scored_count(batch: Batch, settings: DiffusionSettings) -> Tensor:
    """Return over how many tokens the mean of a batch's loss is taken, an int64 scalar.

    Every token that may be masked, where views complement each other or the weights make up for those that are not; the masked
    ones otherwise.
    """
    if settings.complementary or settings.weighting == "inverse":
        return maskable(batch["labels"]).sum()
    return make_views(batch, settings).masked.sum()


@torch.no_grad()
def diffusion_bound(model: PreTrainedModel, batches: Iterable[Batch], settings: DiffusionSettings, draws: int = 1) -> float:
    """Return an estimate of the upper bound of the negative log-likelihood, nats a token (NELBO; MDLM eq. 10, BD3-LM eq. 8).

    Not to be compared with the likelihood of an autoregressive model. With token shift and blocks it is no bound on what decoding
    draws from, but an estimate: a block's first token is read from the noisy block before it, and decoding reads it from the
    finished one. The same masks every time, of seeds that training does not use.

    Args:
        model: measured in evaluation mode, in its current lambda.
        batches: as in `make_views`.
        settings: blocks and token shift count; views and weights are the bound's own.
        draws: masks for every row, more of them for a smaller error.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with constant_weights(model):
        for batch in batches:
            for draw in range(draws):
                once = replace(settings, complementary=False, weighting="inverse", seed=HELDOUT_SEED + draw)
                total += float(diffusion_step(model, batch, once)["dlm"])
                count += int(scored_count(batch, once))
    model.train(was_training)
    return total / max(1, count)


HELDOUT_SEED = 2**40
