"""Scaled rotary positions: what `transformers` calls `rope_parameters` as a file's keys and tensors, and back."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_arch.errors import UserError

FACTORS = "rope_freqs.weight"
"""What llama.cpp divides the frequencies by, `[head_dim / 2]`."""


def llama3_factors(rope: dict[str, Any], head_dim: int) -> NDArray[np.float32]:
    """Return by what Llama 3.1's scaling divides each frequency, float32 `[head_dim / 2]`.

    Source: `_compute_llama3_parameters` of transformers.
    """
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    frequencies = float(rope["rope_theta"]) ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = context * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def llama3_parameters(factors: NDArray[np.float32], theta: float) -> dict[str, Any]:
    """Return the `rope_parameters` that give such factors.

    The file holds only the factors. All released models use the same three other numbers; these, and contexts that are powers of
    two, are tried.

    Raises:
        UserError: if none of them fits.
    """
    if np.isfinite(factors).all() and factors.max() >= 1:
        for exponent in (13, *range(6, 24)):
            rope = {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": float(factors.max()),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 2**exponent,
            }
            if np.allclose(llama3_factors(rope, 2 * len(factors)), factors, rtol=1e-4):
                return rope
    raise UserError(
        "its rotary frequencies are scaled in a way that cannot be told from a file: use low_freq_factor 1 and high_freq_factor 4"
    )


def rope_of(config: Any) -> dict[str, Any]:
    """Return the rotary parameters of a configuration's full-attention layers.

    Raises:
        UserError: for a scaling that a file cannot hold.
    """
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"rotary positions of kind {kind!r} cannot be exported: only default, linear and llama3 ones can")
    if kind == "llama3":
        llama3_parameters(llama3_factors(rope, head_width(config)), rope["rope_theta"])  # what cannot be read back is not written
    return dict(rope)


def local_theta(config: Any) -> float | None:
    """Return the rotary base of a configuration's sliding layers, None where they have none of their own.

    Raises:
        UserError: if they are scaled.
    """
    rope = config.rope_parameters.get("sliding_attention")
    if rope is None:
        return None
    if rope.get("rope_type", "default") != "default":
        raise UserError("scaled rotary positions of sliding layers cannot be exported")
    return float(rope["rope_theta"])


def head_width(config: Any) -> int:
    """Return the width of a configuration's heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
