"""Calibration: the token ids that a model is run on before it is changed."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from bitnet_arch.errors import UserError


def check_calibration(calibration: Iterable[Tensor], vocabulary: int, positions: int | None = None) -> list[Tensor]:
    """Return calibration as a list of rows, having refused what no model can be run on.

    Args:
        calibration: token ids, each int64 (or int32) `[batch, time]`.
        vocabulary: how many tokens the model has.
        positions: the longest text that the model is made for, its `max_position_embeddings`; None where it names none.

    Raises:
        UserError: for no tokens, a row that is empty, of another shape or no integers, an id that the model does not have, or
            a row that is longer than the model's positions.
    """
    rows = list(calibration)
    if not rows:
        raise UserError(NO_TOKENS)
    for number, ids in enumerate(rows):
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            found = f"{ids.dtype} {list(ids.shape)}".removeprefix("torch.") if isinstance(ids, Tensor) else type(ids).__name__
            raise UserError(f"row {number} of calibration is {found}: pass a list of token ids, each int64 [batch, time]")
        if not ids.numel():
            raise UserError(f"row {number} of calibration is empty ({NO_TOKENS})" if len(rows) > 1 else NO_TOKENS)
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise UserError(f"calibration has a token id outside the vocabulary of {vocabulary}: use the model's tokenizer")
        if positions is not None and ids.shape[1] > positions:
            raise UserError(f"row {number} of calibration has {ids.shape[1]} tokens, and the model {positions} positions: cut it")
    return rows


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the longest text that a model is made for, None where its configuration does not say."""
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


NO_TOKENS = "calibration has no tokens: pass token ids of text like the model's use"
