"""Write a model directory as GGUF, tensor by tensor, and check every byte that was written."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_arch.checkpoint import WeightReader, open_weights
from bitnet_arch.convert import is_quantized_linear
from bitnet_arch.errors import UserError
from bitnet_arch.gguf.reader import read_gguf
from bitnet_arch.gguf.tokenizer import read_tokenizer
from bitnet_arch.gguf.types import BY_ID, F16, F32, TYPES, choose_type, f16_scale

# gguf-py does not know Q2_0 yet; with its size registered it writes the bytes it is given.
gguf.GGML_QUANT_SIZES.setdefault(42, (64, 18))  # type: ignore[arg-type]

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
class GgufReport:
    """What was written.

    Attributes:
        path: the file.
        architecture: its `general.architecture`.
        tensors: GGUF name to type name.
        bytes: the file's size.
    """

    path: str
    architecture: str
    tensors: dict[str, str]
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)


@dataclass(frozen=True)
class _Plan:
    source: str
    name: str
    shape: tuple[int, ...]
    ggml_id: int


def export_gguf(
    directory: Path | str, out: Path | str, kind: str = "auto", progress: Callable[[int, int], None] | None = None
) -> GgufReport:
    """Export a SubLN'd model directory (master or packed) for llama.cpp's `bitnet` architecture.

    Weights become ternary by absmean before packing, with the scale rounded to f16, so every ternary type holds the same
    numbers. The file is read back and compared byte for byte before it takes its name. This proves the file, not an engine: no
    engine has run it.

    Args:
        directory: the model directory.
        out: the file to write.
        kind: type of the quantised matrices: "auto" (TQ2_0 where a row divides by 256, else Q2_0), "f16", "tq1_0", "tq2_0", "q2_0".
        progress: called with (tensors done, tensors in all).

    Raises:
        UserError: if the architecture cannot hold the model, a width cannot have the type, or writing fails.
    """
    out = Path(out)
    with open_weights(directory) as reader:
        _check_architecture(reader)
        plans = list(_plan(reader, kind))
        temporary: Path | None = None
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
            os.close(handle)
            temporary = Path(name)
            _write(reader, plans, temporary, progress)
            _verify(reader, plans, temporary)
            temporary.chmod(0o644)
            os.replace(temporary, out)
        except OSError as error:
            raise UserError(f"writing {out} failed ({error.strerror}): free some space or choose another output") from None
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
    names = {F32: "f32", F16: "f16"} | {kind.ggml_id: kind.name for kind in TYPES.values()}
    return GgufReport(str(out), "bitnet", {plan.name: names[plan.ggml_id] for plan in plans}, out.stat().st_size)


def _check_architecture(reader: WeightReader) -> None:
    config, where = reader.config, reader.directory
    if config["model_type"] != "bitnet":
        raise UserError(f"{where} is a {config['model_type']!r}: only a SubLN'd model (model_type bitnet) can be exported yet")
    if config.get("hidden_act") != "silu":
        raise UserError(f"{where} uses {config.get('hidden_act')}, but llama.cpp's bitnet computes SiLU: no stock engine runs it")
    if not config.get("tie_word_embeddings"):
        raise UserError(f"{where} has an untied head, which llama.cpp's bitnet cannot hold: tie the embeddings")
    if config.get("attention_bias"):
        raise UserError(f"{where} has attention biases, which llama.cpp's bitnet cannot hold")
    if (config.get("rope_parameters") or {}).get("rope_type", "default") != "default":
        raise UserError(f"{where} scales its rotary positions, which llama.cpp's bitnet cannot hold")
    if reader.form == "float":
        raise UserError(f"{where} is not ternary: convert and train it first")


def _plan(reader: WeightReader, requested: str) -> Iterator[_Plan]:
    yield _Plan("model.embed_tokens.weight", "token_embd.weight", reader.shape("model.embed_tokens.weight"), F16)
    yield _Plan("model.norm.weight", "output_norm.weight", reader.shape("model.norm.weight"), F32)
    config = reader.config
    for layer in range(config["num_hidden_layers"]):
        for module, short in LAYER_NAMES.items():
            source, name = f"model.layers.{layer}.{module}.weight", f"blk.{layer}.{short}.weight"
            shape = reader.shape(source)
            ggml_id = F32
            if is_quantized_linear(module):
                if reader.form == "packed":
                    shape = (shape[0] * 4, shape[1])
                chosen = choose_type(requested, shape[1], name)
                ggml_id = F16 if chosen == "f16" else TYPES[chosen].ggml_id
            yield _Plan(source, name, shape, ggml_id)


def _encode(reader: WeightReader, plan: _Plan) -> NDArray[Any]:
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


def _nbytes(plan: _Plan) -> int:
    elements = int(np.prod(plan.shape))
    if plan.ggml_id in BY_ID:
        return elements // BY_ID[plan.ggml_id].block * BY_ID[plan.ggml_id].block_bytes
    return elements * (2 if plan.ggml_id == F16 else 4)


def _write(reader: WeightReader, plans: list[_Plan], path: Path, progress: Callable[[int, int], None] | None) -> None:
    writer = gguf.GGUFWriter(path, "bitnet")
    try:
        _write_metadata(writer, reader)
        for plan in plans:
            if plan.ggml_id in BY_ID:
                kind = BY_ID[plan.ggml_id]
                byte_shape = (plan.shape[0], plan.shape[1] // kind.block * kind.block_bytes)
                writer.add_tensor_info(plan.name, byte_shape, np.dtype(np.uint8), _nbytes(plan), raw_dtype=kind.ggml_id)  # type: ignore[arg-type]
            else:
                dtype = np.dtype(np.float16 if plan.ggml_id == F16 else np.float32)
                writer.add_tensor_info(plan.name, plan.shape, dtype, _nbytes(plan))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, plan in enumerate(plans, 1):
            writer.write_tensor_data(_encode(reader, plan))
            if progress:
                progress(done, len(plans))
    finally:
        writer.close()


def _write_metadata(writer: gguf.GGUFWriter, reader: WeightReader) -> None:
    config = reader.config
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config["rope_parameters"]["rope_theta"]))
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = read_tokenizer(reader.directory, config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.token_types)
    writer.add_token_merges(tokenizer.merges)
    writer.add_add_bos_token(False)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.eos_id is not None:
        writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _verify(reader: WeightReader, plans: list[_Plan], path: Path) -> None:
    """Read the file back and compare every tensor's type, shape and bytes, and its dequantised values with codes x scale."""
    written = read_gguf(path)
    if set(written.tensors) != {plan.name for plan in plans}:
        raise RuntimeError("the written file lists other tensors than were planned")
    for plan in plans:
        info = written.tensors[plan.name]
        expected = _encode(reader, plan)
        same = info.ggml_id == plan.ggml_id and info.shape == plan.shape and written.raw(plan.name).tobytes() == expected.tobytes()
        if same and plan.ggml_id in BY_ID:
            codes, scale = reader.ternary(plan.source)
            exact = codes.numpy().astype(np.float32) * np.float32(f16_scale(float(scale), plan.name))
            same = bool(np.array_equal(written.dequantize(plan.name), exact))
        if not same:
            raise RuntimeError(f"{plan.name} reads back differently from what was written")
