"""Names of tensors: a Hugging Face decoder's and a GGUF file's, and the order of rows in which the two differ."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_arch.errors import UserError

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.down_proj": "ffn_down",
}
"""Maps a block's module to its name in llama.cpp."""

GEMMA_NAMES = LAYER_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FAMILY_NAMES = {
    "bitnet": LAYER_NAMES,
    "gemma3_text": GEMMA_NAMES,
    "llama": LAYER_NAMES,
    "qwen2": LAYER_NAMES,
    "qwen3": LAYER_NAMES,
}
"""Families that a file can hold, by `model_type`."""

_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = re.compile(r"model\.layers\.(\d+)\.(.+?)(\.in_norm)?\.(weight|bias|eps|lrc_u|lrc_v)")


def gguf_name(family: str, name: str) -> str:
    """Return what a file calls a tensor of a model directory.

    Args:
        family: the model's own `model_type`, without our prefix.
        name: such as `model.layers.0.self_attn.q_proj.weight`.

    Raises:
        UserError: if the family or the tensor has no name in GGUF.
    """
    if family not in FAMILY_NAMES:
        raise UserError(f"the tensors of a {family!r} have no names in GGUF: only {', '.join(FAMILY_NAMES)} can be exported")
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _INSIDE.fullmatch(name)
    if match is None or match[2] not in FAMILY_NAMES[family]:
        raise UserError(f"tensor {name!r} has no name in GGUF: this model cannot be exported yet")
    return f"blk.{match[1]}.{FAMILY_NAMES[family][match[2]]}{match[3] or ''}.{match[4]}"


def rotary_heads(config: Any, name: str) -> int:
    """Return how many heads' rows a tensor of a Llama has to be reordered in (0: none), for llama.cpp's NORM rotary positions."""
    if ".self_attn.q_proj." in name:
        return int(config.num_attention_heads)
    if ".self_attn.k_proj." in name:
        return int(config.num_key_value_heads)
    return 0


def interleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder the rows of q or k from halves of a head to pairs of neighbours; no heads, no change."""
    if not heads:
        return rows
    split = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def deinterleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo `interleave`."""
    if not heads:
        return rows
    split = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))
