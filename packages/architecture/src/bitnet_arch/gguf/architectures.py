"""Which `general.architecture` computes a model, and its keys.

A stock name is used only where llama.cpp computes exactly what the model does; everything else is `wrinklefree`, which only our
runtime loads. What a stock name cannot hold is a sentence, so that it can be told to whoever asked for that name.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers.configuration_utils import PreTrainedConfig

from bitnet_arch.checkpoint import check_layers, skeleton
from bitnet_arch.diffusion import diffusion_of
from bitnet_arch.errors import UserError
from bitnet_arch.families import base_type
from bitnet_arch.gguf.names import FAMILY_NAMES
from bitnet_arch.gguf.rope import head_width, local_theta, rope_of
from bitnet_arch.modeling import TernaryForm, form_of
from bitnet_arch.weights import WeightReader

BITNET, OURS = "bitnet", "wrinklefree"
ACTIVATIONS = {"silu": "silu", "relu2": "relu2", "gelu_pytorch_tanh": "gelu_tanh"}
"""Maps an activation function in transformers to its name in a file."""

GEMMA_PATTERN = 6
GEMMA_27B_LAYERS = 62
"""llama.cpp knows Gemma 3 27B by its layers, and scales its attention by hidden size / heads instead of head width."""


def activation_of(config: Any) -> str:
    """Return what transformers calls a configuration's activation function."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def slides(config: Any) -> list[bool]:
    """Return for each layer whether its attention slides."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if len(kinds) != config.num_hidden_layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise UserError(f"attention layers of the kinds {', '.join(sorted(set(kinds)))} cannot be exported")
    return [kind == "sliding_attention" for kind in kinds]


def _no_stock_form(config: Any) -> str | None:
    if diffusion_of(config) is not None:
        return "is a diffusion model, whose attention no stock architecture computes"
    form = form_of(config)
    if form is not None and form.lrc_rank:
        return "has a low-rank correction (LRC), which no stock architecture holds"
    if form is not None and (form.norm != "none" or form.granularity != "tensor" or form.rotation):
        return "has norms, scales or rotations that no stock architecture holds"
    return None


def _bitnet(config: Any) -> str | None:
    if config.hidden_act != "silu":
        return f"uses {config.hidden_act}, but llama.cpp's bitnet computes SiLU: no stock engine runs it"
    if not config.tie_word_embeddings:
        return "has an untied head, which llama.cpp's bitnet cannot hold: tie the embeddings"
    if config.attention_bias:
        return "has attention biases, which llama.cpp's bitnet cannot hold"
    if config.rope_parameters.get("rope_type", "default") != "default":
        return "scales its rotary positions, which llama.cpp's bitnet cannot hold"
    return None


def _llama(config: Any) -> str | None:
    if config.hidden_act != "silu":
        return f"uses {config.hidden_act}, but llama.cpp's llama computes SiLU"
    return "has biases in its MLP, which llama.cpp's llama cannot hold" if config.mlp_bias else None


def _qwen(config: Any) -> str | None:
    if config.hidden_act != "silu":
        return f"uses {config.hidden_act}, but llama.cpp's {config.model_type} computes SiLU"
    if any(slides(config)):
        return f"has sliding windows, which llama.cpp's {config.model_type} has not"
    if base_type(config) == "qwen3" and config.attention_bias:
        return "has attention biases, which llama.cpp's qwen3 cannot hold"
    if rope_of(config).get("rope_type", "default") != "default":
        return f"scales its rotary positions, which has not been tried in llama.cpp's {config.model_type}"
    return None


def _gemma3(config: Any) -> str | None:
    large = config.num_hidden_layers == GEMMA_27B_LAYERS
    scale = config.hidden_size // config.num_attention_heads if large else head_width(config)
    pattern = [(layer + 1) % GEMMA_PATTERN != 0 for layer in range(config.num_hidden_layers)]
    if activation_of(config) != "gelu_pytorch_tanh" or config.query_pre_attn_scalar != scale:
        return "has another activation or attention scale than llama.cpp's gemma3"
    if slides(config) != pattern or local_theta(config) != 10_000.0:
        return f"does not slide in all but every {GEMMA_PATTERN}th layer with a rotary base of 10,000, as llama.cpp's gemma3 does"
    if config.attention_bias or config.attn_logit_softcapping or config.final_logit_softcapping:
        return "has biases or softcaps, which llama.cpp's gemma3 cannot hold"
    if rope_of(config).get("rope_type", "default") != "default":
        return "scales its rotary positions, which has not been tried in llama.cpp's gemma3"
    return None


STOCK: dict[str, tuple[str, Callable[[Any], str | None]]] = {
    "bitnet": (BITNET, _bitnet),
    "gemma3_text": ("gemma3", _gemma3),
    "llama": ("llama", _llama),
    "qwen2": ("qwen2", _qwen),
    "qwen3": ("qwen3", _qwen),
}
"""Maps a family to its architecture in llama.cpp and to what in a configuration that one cannot hold."""


ARCHITECTURES = ("auto", *sorted(name for name, _ in STOCK.values()), OURS)
"""What can be asked for."""


def check_ternary(reader: WeightReader) -> None:
    """Raise `UserError` unless a directory is ternary and complete."""
    if reader.form == "float":
        raise UserError(f"{reader.directory} is not ternary: convert and train it first")
    check_layers(skeleton(reader), reader)


def choose_architecture(reader: WeightReader, requested: str = "auto") -> str:
    """Return the architecture to write a directory's model as.

    Args:
        reader: the directory.
        requested: "auto" takes the stock name if there is one that computes the model, else "wrinklefree"; a name takes that.

    Raises:
        UserError: if the name that was asked for cannot hold the model, or no file can.
    """
    config, where = reader.model_config, reader.directory
    family = base_type(config)
    if family not in FAMILY_NAMES:
        raise UserError(f"{where} is a {config.model_type!r}: only {', '.join(FAMILY_NAMES)} can be exported")
    name, obstacle = STOCK[family]
    if requested not in ("auto", name, OURS):
        raise UserError(
            f"{where} is a {config.model_type!r}, which cannot be written as {requested!r}: choose auto, {name} or {OURS}"
        )
    check_ternary(reader)
    why = _no_stock_form(config) or obstacle(config)
    if why and requested == name:
        raise UserError(f"{where} {why}; choose --architecture auto or {OURS}")
    return OURS if why or requested == OURS else name


def written_architecture(reader: WeightReader, found: Any) -> str:
    """Return the architecture that a file of a directory must have: the one it has, if that can hold the model, else the usual one.

    Args:
        reader: the directory.
        found: the file's `general.architecture`, whatever that is.

    Raises:
        UserError: if no file can hold the model.
    """
    usual = choose_architecture(reader)
    return OURS if found == OURS else usual


def stored_rank(rank: int | float) -> int | float:
    """Return the rank of a low-rank correction as a file's key gives it back: a share has 32 bits there."""
    return rank if isinstance(rank, int) else float(str(np.float32(rank)))


def model_keys(config: PreTrainedConfig, architecture: str) -> dict[str, Any]:
    """Return a model's keys without the architecture's name before them: int stands for uint32, float for float32.

    Raises:
        UserError: for what no file can say.
    """
    c: Any = config
    width, rope = head_width(c), rope_of(c)
    keys = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": width,
        "vocab_size": c.vocab_size,
    }
    if architecture != BITNET:
        keys |= {"attention.key_length": width, "attention.value_length": width}
    if rope.get("rope_type") == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if any(slides(c)):
        keys["attention.sliding_window"] = c.sliding_window
        if architecture == OURS:
            keys["attention.sliding_window_pattern"] = slides(c)
        if (theta := local_theta(c)) is not None:
            keys["rope.freq_base_swa"] = theta
    return keys | _our_keys(c) if architecture == OURS else keys


def _our_keys(config: Any) -> dict[str, Any]:
    family = base_type(config)
    gemma = family == "gemma3_text"
    form = form_of(config) or TernaryForm()
    norm = "subln" if family == "bitnet" and form.norm == "none" else form.norm
    activation = activation_of(config)
    if activation not in ACTIVATIONS:
        raise UserError(f"the activation {activation!r} has no name in a file: only {', '.join(ACTIVATIONS)} have")
    if gemma and config.use_bidirectional_attention:
        raise UserError("a model that attends to later tokens cannot be exported")
    keys = {
        "family": family,
        "activation": ACTIVATIONS[activation],
        "norm_placement": norm,
        "scale_granularity": form.granularity,
        "rotation": form.rotation,
        "activation_bits": 8,
        "attention.qk_norm": family in ("qwen3", "gemma3_text"),
        "attention.bias": family == "qwen2" or bool(getattr(config, "attention_bias", False)),
        "attention.scale": float(config.query_pre_attn_scalar if gemma else head_width(config)) ** -0.5,
        "post_norms": gemma,
        "embedding_scale": float(config.hidden_size) ** 0.5 if gemma else 1.0,
    }
    if (diffusion := diffusion_of(config)) is not None:
        keys |= {"diffusion.mask_token_id": diffusion.mask_token_id, "diffusion.token_shift": diffusion.token_shift}
        keys |= {} if diffusion.block_size is None else {"diffusion.block_size": diffusion.block_size}
    if form.lrc_rank:
        keys["lrc.rank"] = form.lrc_rank
    if cap := getattr(config, "final_logit_softcapping", None):
        keys["logit_softcap"] = float(cap)
    if cap := getattr(config, "attn_logit_softcapping", None):
        keys["attention.logit_softcap"] = float(cap)
    return keys
