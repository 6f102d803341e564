"""What a GGUF file of a model directory must hold: its tensors, their encoding and its metadata."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_arch.checkpoint import WeightReader, read_provenance, skeleton
from bitnet_arch.convert import is_quantized_linear
from bitnet_arch.errors import UserError
from bitnet_arch.gguf.tokenizer import read_tokenizer
from bitnet_arch.gguf.types import BY_ID, F16, F32, TYPES, choose_type, f16_scale

ARCHITECTURE = "bitnet"
PROVENANCE_KEY = "wrinklefree.provenance"

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to write: its name in the checkpoint and in the file, its shape and its ggml type."""

    source: str
    name: str
    shape: tuple[int, ...]
    ggml_id: int


def check_architecture(reader: WeightReader) -> None:
    """Raise `UserError` unless llama.cpp's `bitnet` computes what the directory's model does, and the directory is complete."""
    config, where = reader.model_config, reader.directory
    if config.model_type != "bitnet":
        raise UserError(f"{where} is a {config.model_type!r}: only a SubLN'd model (model_type bitnet) can be exported yet")
    if config.hidden_act != "silu":
        raise UserError(f"{where} uses {config.hidden_act}, but llama.cpp's bitnet computes SiLU: no stock engine runs it")
    if not config.tie_word_embeddings:
        raise UserError(f"{where} has an untied head, which llama.cpp's bitnet cannot hold: tie the embeddings")
    if config.attention_bias:
        raise UserError(f"{where} has attention biases, which llama.cpp's bitnet cannot hold")
    if config.rope_parameters.get("rope_type", "default") != "default":
        raise UserError(f"{where} scales its rotary positions, which llama.cpp's bitnet cannot hold")
    if reader.form == "float":
        raise UserError(f"{where} is not ternary: convert and train it first")
    skeleton(reader)


def plan_tensors(reader: WeightReader, requested: str) -> Iterator[TensorPlan]:
    """Yield the tensors of a file whose quantised matrices have the type `requested` (or "auto")."""
    yield TensorPlan("model.embed_tokens.weight", "token_embd.weight", reader.shape("model.embed_tokens.weight"), F16)
    yield TensorPlan("model.norm.weight", "output_norm.weight", reader.shape("model.norm.weight"), F32)
    for layer in range(reader.model_config.num_hidden_layers):
        for module, short in LAYER_NAMES.items():
            source, name = f"model.layers.{layer}.{module}.weight", f"blk.{layer}.{short}.weight"
            shape = reader.shape(source)
            ggml_id = F32
            if is_quantized_linear(module):
                chosen = choose_type(requested, shape[1], name)
                ggml_id = F16 if chosen == "f16" else TYPES[chosen].ggml_id
            yield TensorPlan(source, name, shape, ggml_id)


def encode(reader: WeightReader, plan: TensorPlan) -> NDArray[Any]:
    """Return a tensor's data as the file holds it: float array, or bytes `[rows, row_bytes]`."""
    if is_quantized_linear(plan.source.removesuffix(".weight")):
        codes, scale = reader.ternary(plan.source)
        rounded = f16_scale(float(scale), plan.name)
        if plan.ggml_id == F16:
            return codes.numpy().astype(np.float16) * rounded
        return BY_ID[plan.ggml_id].encode(codes.numpy(), rounded)
    dtype = torch.float16 if plan.ggml_id == F16 else torch.float32
    values: NDArray[Any] = reader.get(plan.source).to(dtype).contiguous().numpy()
    if not np.isfinite(values).all():
        raise UserError(f"{plan.source} holds values that f16 or f32 cannot: the checkpoint is damaged or out of range")
    return values


def stored_bytes(plan: TensorPlan) -> int:
    """Return how many bytes a tensor takes in the file."""
    elements = int(np.prod(plan.shape))
    if plan.ggml_id in BY_ID:
        return elements // BY_ID[plan.ggml_id].block * BY_ID[plan.ggml_id].block_bytes
    return elements * (2 if plan.ggml_id == F16 else 4)


def expected_metadata(reader: WeightReader) -> dict[str, Any]:
    """Return the file's keys and values: int stands for uint32, float for float32, a list for an array."""
    config: Any = reader.model_config
    heads = config.num_attention_heads
    tokenizer = read_tokenizer(reader.directory, config.vocab_size)
    model = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": config.hidden_size // heads,
        "vocab_size": config.vocab_size,
    }
    words = {
        "ggml.model": "gpt2",
        "ggml.pre": tokenizer.pre,
        "ggml.tokens": tokenizer.tokens,
        "ggml.token_type": tokenizer.token_types,
        "ggml.merges": tokenizer.merges,
        "ggml.add_bos_token": tokenizer.add_bos,
        "ggml.add_eos_token": tokenizer.add_eos,
        "ggml.bos_token_id": tokenizer.bos_id,
        "ggml.eos_token_id": tokenizer.eos_id,
        "ggml.padding_token_id": tokenizer.pad_id,
        "chat_template": tokenizer.chat_template or None,
    }
    values = {f"{ARCHITECTURE}.{key}": value for key, value in model.items()}
    values |= {f"tokenizer.{key}": value for key, value in words.items()}
    values[PROVENANCE_KEY] = read_provenance(reader.directory)
    # An empty list has no type that GGUF could write: a tokenizer without merges has none.
    return {"general.architecture": ARCHITECTURE} | {k: v for k, v in values.items() if v is not None and v != []}
