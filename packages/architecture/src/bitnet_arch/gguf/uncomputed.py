"""Keys of other people's files that would change what a model computes, in a way that no model here computes."""

from collections.abc import Mapping
from typing import Any

UNCOMPUTED: dict[str, tuple[float, ...]] = {
    "attention.causal": (1,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.dimension_sections": (),
    "rope.scale_linear": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (0,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (0,),
}
"""Maps a key, without the architecture before it, to the numbers (of a flag 0 or 1) with which it changes nothing: a file that has
the key with anything else is refused. The native runtime has the same table (`cpp/runtime/keys.cpp`)."""


def uncomputed_key(metadata: Mapping[str, Any], architecture: str) -> str | None:
    """Return a key of a file's metadata that asks for what no model here computes, None if there is none."""
    for key, harmless in UNCOMPUTED.items():
        value = metadata.get(f"{architecture}.{key}")
        if value is not None and not (isinstance(value, int | float) and value in harmless):
            return f"{architecture}.{key}"
    return None
