"""Attention masks of any shape, and logits of chosen positions, for every family of `bitnet_arch.families`.

Stock decoders build causal masks themselves; what is not causal is handed to them through these two functions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SLIDING = "sliding_attention"


def attention_argument(model: PreTrainedModel, allowed: Tensor, queries: Tensor, keys: Tensor) -> Tensor | dict[str, Tensor]:
    """Return what a decoder takes as `attention_mask` so that queries attend to exactly the allowed keys.

    Layers with a sliding window (Gemma3) see less: of the allowed keys, those less than a window away, on either side. Causal
    masks come out as stock transformers makes them.

    Args:
        model: the decoder.
        allowed: bool `[B, Q, K]` (B may be 1), True = may attend; no query may be left without a key.
        queries: positions of the queries, int64 `[B, Q]`.
        keys: positions of the keys, int64 `[B, K]`.

    Returns:
        `[B, 1, Q, K]`, bool, or of the model's float type where its attention adds masks ("eager"); for a decoder with sliding
        layers a dict of two of them.
    """
    window = getattr(model.config, "sliding_window", None)
    if SLIDING not in (getattr(model.config, "layer_types", None) or ()) or window is None:
        return _formatted(model, allowed)
    near = (queries[:, :, None] - keys[:, None, :]).abs() < window
    return {"full_attention": _formatted(model, allowed), SLIDING: _formatted(model, allowed & near)}


def _formatted(model: PreTrainedModel, allowed: Tensor) -> Tensor:
    mask = allowed[:, None]
    if model.config._attn_implementation != "eager":
        return mask
    dtype = model.get_input_embeddings().weight.dtype
    assert isinstance(dtype, torch.dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def hidden_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Return what the head reads, `[B, T, hidden]`: the decoder's output after its last norm.

    Args:
        model: a causal language model.
        inputs: of its decoder, such as `input_ids`, `attention_mask`, `position_ids`, `past_key_values`.
    """
    decoder = model.base_model
    hidden: Tensor = decoder(**inputs).last_hidden_state
    return hidden


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return logits `[..., V]` of what the head reads, `[..., hidden]`, capped where the family caps them (Gemma)."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    logits: Tensor = head(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
