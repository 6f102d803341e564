"""A file's keys as a configuration: what kind of model it asks for, and whether one can be that."""

import math
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from bitnet_arch.configs import LARGEST_SIZE, check_shape
from bitnet_arch.diffusion import DIFFUSION_KEY, diffusion_of
from bitnet_arch.errors import UserError
from bitnet_arch.families import base_type
from bitnet_arch.gguf.architectures import ACTIVATIONS, GEMMA_PATTERN, OURS, STOCK
from bitnet_arch.gguf.reader import GgufFile
from bitnet_arch.gguf.rope import FACTORS, llama3_parameters
from bitnet_arch.gguf.uncomputed import uncomputed_key
from bitnet_arch.lrc.adapters import check_rank
from bitnet_arch.modeling import Placement, TernaryForm
from bitnet_arch.quant import Granularity

MICROSOFT = ("bitnet-25", "bitnet-b1.58")
"""What bitnet.cpp calls BitNet b1.58 2B4T: `bitnet` with ReLU²."""

FAMILY_OF = {name: family for family, (name, _) in STOCK.items()} | dict.fromkeys(MICROSOFT, "bitnet")
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
MOST_COLUMNS = 2**23
"""Of a ternary matrix: int32 sums of 8-bit activations are exact up to there.

`bitnet_kernels` has the same limit (ternary.h), and need not be installed here; tests/test_native_reader.py compares the two.
"""
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class FileKeys:
    """A file's keys under its architecture's name, checked as they are read."""

    file: GgufFile
    architecture: str

    def fail(self, why: str) -> UserError:
        """Return the error of a file that cannot be imported."""
        return UserError(f"{self.file.path} cannot be imported ({why})")

    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        """Return a key's value of a type, or the default where there is none; without a default the key is needed."""
        value: Any = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise self.fail(f"it has no key {self.architecture}.{key}")
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise self.fail(f"its key {self.architecture}.{key} is {value!r:.40}")
        if not isinstance(value, float):
            return value
        if value and not SMALLEST <= abs(value) <= LARGEST:
            raise self.fail(f"its key {self.architecture}.{key} is {value!r:.40}, too large or too small for float32")
        return float(str(np.float32(value)))  # 9.999999747378752e-06 in 32 bits was written as 1e-05

    def has(self, key: str) -> bool:
        """Return whether the file has a key."""
        return f"{self.architecture}.{key}" in self.file.metadata

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        """Return a key's value, one of several."""
        value: str = self.get(key, str, default)
        if value not in choices:
            raise self.fail(f"its key {self.architecture}.{key} is {value!r:.40}, none of {', '.join(choices)}")
        return value


def config_of(keys: FileKeys, family: str) -> PreTrainedConfig:
    """Return the stock configuration of a file's keys, checked against the sizes of its tensors."""
    file, ours = keys.file, keys.architecture == OURS
    if (uncomputed := uncomputed_key(file.metadata, keys.architecture)) is not None:
        raise keys.fail(f"its key {uncomputed} asks for what no model here computes")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise keys.fail("it has no matrix token_embd.weight")
    if keys.get("vocab_size", int, embedding.shape[0]) != embedding.shape[0]:
        raise keys.fail(f"its key {keys.architecture}.vocab_size is not the number of rows of token_embd.weight")
    layers, heads = keys.get("block_count", int), keys.get("attention.head_count", int)
    if not 1 <= layers <= len(file.tensors):
        raise keys.fail(f"it claims {layers} layers and has {len(file.tensors)} tensors")
    if heads < 1:
        raise keys.fail(f"it claims {heads} heads")
    hidden = keys.get("embedding_length", int)
    width = keys.get("attention.key_length", int, hidden // heads)
    wide = {"embedding_length": hidden, "feed_forward_length": keys.get("feed_forward_length", int)}
    if (key := next((key for key, columns in wide.items() if columns > MOST_COLUMNS), None)) is not None:
        raise keys.fail(f"its key {keys.architecture}.{key} is no whole number from 1 to {MOST_COLUMNS}")
    if heads * width > MOST_COLUMNS:
        raise keys.fail(f"its heads together are wider than {MOST_COLUMNS}")
    if keys.get("attention.value_length", int, width) != width or keys.get("rope.dimension_count", int, width) != width:
        raise keys.fail("its heads have keys, values and rotary positions of different widths")
    relu2 = keys.architecture in MICROSOFT
    values: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.get("feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", int, heads),
        "max_position_embeddings": keys.get("context_length", int),
        "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(keys, family),
        **_token_ids(file, embedding.shape[0]),
    }
    if family in ("bitnet", "qwen2"):
        if width * heads != hidden:
            raise keys.fail(f"its {heads} heads of {width} do not fill its width of {hidden}, as a {family}'s do")
    else:
        values["head_dim"] = width
    activation = "relu2" if relu2 else "gelu_tanh" if family == "gemma3_text" else "silu"
    activation = keys.choice("activation", tuple(ACTIVATIONS.values()), activation) if ours else activation
    torch_name = {ours_: theirs for theirs, ours_ in ACTIVATIONS.items()}[activation]
    values["hidden_activation" if family == "gemma3_text" else "hidden_act"] = torch_name
    if family != "qwen2":
        values["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
    if family == "llama":
        values["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    values |= _sliding(keys, family, layers)
    if family == "gemma3_text":
        values |= _gemma(keys, values)
    elif keys.has("logit_softcap") or keys.has("attention.logit_softcap"):
        raise keys.fail(f"it caps logits, which no model of the family {family} does")
    else:
        for key, usual in (("embedding_scale", 1.0), ("attention.scale", float(width) ** -0.5)):
            if abs(keys.get(key, float, usual) / usual - 1) > 1e-6:
                raise keys.fail(f"its key {keys.architecture}.{key} is not what its family has")
    if ours:
        _check_flags(keys, family)
    if ours and any(keys.has(f"diffusion.{key}") for key in ("mask_token_id", "block_size", "token_shift")):
        values[DIFFUSION_KEY] = {
            "mask_token_id": keys.get("diffusion.mask_token_id", int),
            "block_size": keys.get("diffusion.block_size", int, 0) or None,
            "token_shift": keys.get("diffusion.token_shift", bool),
        }
    config: PreTrainedConfig = AutoConfig.for_model(family, **values)
    check_shape(config, str(file.path))
    diffusion_of(config)
    return config


def _check_flags(keys: FileKeys, family: str) -> None:
    """Refuse flags of our own files that say otherwise than the family or the tensors do."""
    gemma, biased = family == "gemma3_text", family == "qwen2" or "blk.0.attn_output.bias" in keys.file.tensors
    for flag, is_ in (("attention.qk_norm", gemma or family == "qwen3"), ("attention.bias", biased), ("post_norms", gemma)):
        if keys.get(flag, bool, is_) is not is_:
            raise keys.fail(f"its key {OURS}.{flag} is {not is_}, but its family and its tensors say {is_}")


def _rope(keys: FileKeys, family: str) -> dict[str, Any]:
    theta, local = (keys.get(f"rope.freq_base{suffix}", float, 10_000.0) for suffix in ("", "_swa"))
    for base in (theta, local):
        if base <= 0:
            raise keys.fail(f"its rotary base is {base}")
    if family != "gemma3_text" and keys.has("rope.freq_base_swa") and local != theta:
        raise keys.fail("sliding layers have a rotary base of their own, which those of its family have not")
    kind = keys.choice("rope.scaling.type", ("none", "linear"), "none")
    factor = keys.get("rope.scaling.factor", float, None if kind == "linear" else 1.0)
    if kind != "linear" and factor not in (0.0, 1.0):
        raise keys.fail(f"its key {keys.architecture}.rope.scaling.factor is {factor}, but rope.scaling.type is not linear")
    if kind == "linear" and factor <= 0:
        raise keys.fail(f"its rotary positions are divided by {factor}")
    if FACTORS in keys.file.tensors and keys.architecture in ("llama", OURS):
        if kind == "linear":
            raise keys.fail(f"it scales its rotary positions both by a factor and by {FACTORS}")
        return llama3_parameters(keys.file.dequantize(FACTORS).reshape(-1), theta)
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _token_ids(file: GgufFile, vocabulary: int) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        found[name] = value if type(value) is int and 0 <= value < vocabulary else None
    return found


def _sliding(keys: FileKeys, family: str, layers: int) -> dict[str, Any]:
    window, gemma = keys.get("attention.sliding_window", int, 0), family == "gemma3_text"
    ours, key = keys.architecture == OURS, "attention.sliding_window_pattern"
    may_slide = gemma or (ours and family not in ("llama", "bitnet"))
    pattern = [gemma and window > 0 and (layer + 1) % GEMMA_PATTERN != 0 for layer in range(layers)]
    if ours and keys.has(key):
        pattern = keys.get(key, list)
        if len(pattern) != layers or any(type(slides) is not bool for slides in pattern):
            raise keys.fail(f"its sliding_window_pattern does not say for each of {layers} layers whether it slides")
    elif keys.has(key) and not (gemma and keys.get(key, int) == GEMMA_PATTERN):
        raise keys.fail(f"its key {keys.architecture}.{key} is not that of its family")
    elif ours and may_slide and not gemma and window:
        raise keys.fail(f"it has no key {OURS}.{key}, so that nothing says which layers slide")
    if not 0 <= window <= LARGEST_SIZE or (window == 0 and any(pattern)):
        raise keys.fail(f"its layers slide with a window of {window}")
    if gemma and len(set(pattern)) < 2:  # transformers' configuration would not have rotary positions of both kinds
        raise keys.fail("all of its layers slide or none, which a Gemma 3 cannot have")
    if not may_slide and (any(pattern) or 0 < window < keys.get("context_length", int)):
        raise keys.fail(f"it has a sliding window, which a {family} has not")
    if not may_slide or (window == 0 and not gemma):
        return {}
    found: dict[str, Any] = {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern]}
    if window:
        found["sliding_window"] = window
    if family != "gemma3_text":
        found["use_sliding_window"] = True
    return found


def _gemma(keys: FileKeys, values: dict[str, Any]) -> dict[str, Any]:
    """Return what a Gemma 3 has beyond the others."""
    hidden, width = values["hidden_size"], values["head_dim"]
    if abs(keys.get("embedding_scale", float, float(hidden) ** 0.5) / hidden**0.5 - 1) > 1e-6:
        raise keys.fail("it scales its embeddings otherwise than by the root of their width")
    large = keys.architecture != OURS and values["num_hidden_layers"] == 62
    usual = float(hidden // values["num_attention_heads"] if large else width) ** -0.5
    scale = keys.get("attention.scale", float, usual)
    if keys.architecture != OURS and abs(scale / usual - 1) > 1e-6:
        raise keys.fail(f"its key {keys.architecture}.attention.scale is not what its family has")
    if not 1e-6 < scale < 1e3:
        raise keys.fail(f"it scales attention by {scale}")
    local = keys.get("rope.freq_base_swa", float, 10_000.0)
    scalar = scale**-2
    found: dict[str, Any] = {
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-3 else scalar,
        "use_bidirectional_attention": False,
        "rope_parameters": {
            "full_attention": values["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }
    for name, key in (("final_logit_softcapping", "logit_softcap"), ("attn_logit_softcapping", "attention.logit_softcap")):
        cap = keys.get(key, float, 0.0)
        if cap < 0:
            raise keys.fail(f"its key {keys.architecture}.{key} is {cap}")
        if cap > 0:
            found[name] = cap
    return found


def form_of_file(keys: FileKeys, base: PreTrainedConfig) -> TernaryForm:
    """Return the form that a file's keys ask for; scales may turn out finer."""
    if keys.architecture != OURS:
        return TernaryForm()
    if keys.get("activation_bits", int, 8) != 8:
        raise keys.fail("its activations have not 8 bits")
    norm = keys.choice("norm_placement", get_args(Placement), "none")
    if base_type(base) == "bitnet" and norm == "subln":  # its own, not added ones
        norm = "none"
    granularity = keys.choice("scale_granularity", GRANULARITIES, "tensor")
    rotation, rank = keys.get("rotation", bool, False), _rank(keys)
    return TernaryForm(norm=norm, granularity=granularity, rotation=rotation, lrc_rank=rank)  # type: ignore[arg-type]


def _rank(keys: FileKeys) -> int | float:
    """Return the rank of the low-rank correction: a whole number, a share of each layer's smaller side, or 0 for none."""
    share = isinstance(keys.file.metadata.get(f"{keys.architecture}.lrc.rank"), float)
    rank: int | float = keys.get("lrc.rank", float if share else int, 0)
    if rank or share:
        check_rank(rank)
    return rank
