"""What a GGUF file of a model directory must hold: its tensors, their encoding and its metadata."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitnet_arch.checkpoint import read_provenance
from bitnet_arch.errors import UserError
from bitnet_arch.families import base_type, family_of, quantized_names
from bitnet_arch.gguf.architectures import BITNET, model_keys, stored_rank
from bitnet_arch.gguf.floats import EMBEDDING_TYPES, PLAIN, bf16_bytes, encode_float, tensor_bytes
from bitnet_arch.gguf.names import gguf_name, interleave, rotary_heads
from bitnet_arch.gguf.rope import FACTORS, head_width, llama3_factors, rope_of
from bitnet_arch.gguf.tokenizer import read_tokenizer
from bitnet_arch.gguf.types import BF16, BY_ID, F16, F32, I2_S, TYPES, choose_type, encode_i2_s, f16_scales
from bitnet_arch.lrc.adapters import as_stored, layer_rank
from bitnet_arch.modeling import TernaryForm, form_of
from bitnet_arch.quant import GROUP, Granularity
from bitnet_arch.weights import WeightReader

PROVENANCE_KEY = "wrinklefree.provenance"
EMBEDDINGS = ("token_embd.weight", "output.weight")
"""The embedding and, where it is not the embedding, the head."""


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to write.

    Attributes:
        source: its name in the checkpoint.
        name: its name in the file.
        shape: its shape, row-major.
        ggml_id: its type.
        part: "float" for what is not ternary; "ternary" for a matrix with its scale; "codes" and "scale" for a matrix whose type
            cannot hold its scales, which are a tensor of their own, `.scale`; "rope" for the factors of rotary frequencies;
            "adapter" for U `[out, rank]` or V `[in, rank]` of a low-rank correction.
        heads: how many heads' rows are reordered, see `bitnet_arch.gguf.names.rotary_heads`.
        offset: added to float values (Gemma's norms).
    """

    source: str
    name: str
    shape: tuple[int, ...]
    ggml_id: int
    part: Literal["float", "ternary", "codes", "scale", "rope", "adapter"] = "float"
    heads: int = 0
    offset: float = 0.0


Choice = str | Callable[[str], str]
"""The name of a type, or a function from a tensor's name in the file to one."""


def plan_tensors(
    reader: WeightReader, requested: Choice, architecture: str = BITNET, embedding: Choice = "f16"
) -> Iterator[TensorPlan]:
    """Yield the tensors of a file whose quantised matrices have the type `requested` (or "auto").

    Scales are where the type has room for them: TQ1_0 and TQ2_0 blocks of 256 and Q2_0 blocks of 64 hold the scale of a tensor or a
    row, Q2_0 blocks that of a group of 128, too; I2_S holds a tensor's. "auto" takes what has room, because a block's f16 needs no
    other code in an engine. Asked for by name, the other types get scales of 1 and a float32 tensor `.scale`.

    A low-rank correction is two f16 tensors, `.lrc_u` `[out, rank]` and `.lrc_v` `[in, rank]`. Adapters that a directory keeps in
    int8 are written as what their codes stand for, rounded to f16.

    Args:
        reader: the directory.
        requested: type of the quantised matrices.
        architecture: `general.architecture`.
        embedding: type of embeddings and head.

    Raises:
        UserError: for an unknown type, or a width that a type cannot have.
    """
    kind_of = (lambda _: requested) if isinstance(requested, str) else requested
    embedding_of = (lambda _: embedding) if isinstance(embedding, str) else embedding
    config = reader.model_config
    family, kind = family_of(config), base_type(config)
    model = _unpacked_skeleton(config)
    matrices = {f"{name}.weight" for name in quantized_names(model)}
    tensors = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors |= {name: (1,) for name, _ in model.named_buffers() if name.endswith(".in_norm.eps")}
    for source, shape in tensors.items():
        if source not in reader and source.endswith(".bias"):  # some packed checkpoints have none
            continue
        stored = reader.shape(source)
        if (stored or (1,)) != shape:
            raise UserError(f"{reader.directory}: tensor {source!r} is {list(stored)}, but config.json asks for {list(shape)}")
        name = gguf_name(kind, source)
        heads = rotary_heads(config, source) if architecture == "llama" else 0
        if source in matrices:
            yield from _matrix_plans(reader.granularity, TensorPlan(source, name, shape, F32, heads=heads), kind_of(name))
        elif source.endswith((".lrc_u", ".lrc_v")):
            _check_rank(config, tensors, source)
            yield TensorPlan(source, name, shape, F16, "adapter")
        elif name in EMBEDDINGS:
            yield TensorPlan(source, name, shape, _embedding_type(embedding_of(name), name, shape))
        else:
            gain = source.endswith("norm.weight") and ".in_norm." not in source
            yield TensorPlan(source, name, shape, F32, heads=heads, offset=family.norm_offset if gain else 0.0)
    if rope_of(config).get("rope_type") == "llama3":
        yield TensorPlan("rope_parameters", FACTORS, (head_width(config) // 2,), F32, "rope")


def _embedding_type(requested: str, name: str, shape: tuple[int, ...]) -> int:
    if requested not in EMBEDDING_TYPES:
        raise UserError(f"unknown type {requested!r} of embeddings: choose {', '.join(EMBEDDING_TYPES)}")
    ggml_id = EMBEDDING_TYPES[requested]
    if tensor_bytes(ggml_id, shape) is None:
        raise UserError(f"{name} has rows of {shape[-1]}, which {requested.upper()} cannot have: choose f16 or q8_0")
    return ggml_id


def _check_rank(config: Any, tensors: dict[str, tuple[int, ...]], source: str) -> None:
    """Refuse a rank that is a share which 32 bits, as the file's key has, would read as another rank of some layer."""
    form = form_of(config) or TernaryForm()
    rows, columns = tensors[source.rsplit(".", 1)[0] + ".weight"]
    if layer_rank(stored_rank(form.lrc_rank), columns, rows) != tensors[source][1]:
        raise UserError(f"a rank of {form.lrc_rank!r} cannot be held in 32 bits: choose a whole number or fewer digits")


def _matrix_plans(granularity: Granularity, base: TensorPlan, requested: str) -> Iterator[TensorPlan]:
    rows, columns = base.shape
    chosen = choose_type(requested, columns, base.name, (64,) if granularity == "group128" else (256, 64))
    ggml_id = {"f16": F16, "bf16": BF16, "i2_s": I2_S}.get(chosen) or TYPES[chosen].ggml_id
    fits = {
        "tensor": True,
        "row": ggml_id != I2_S,
        "group128": ggml_id in (F16, BF16, TYPES["q2_0"].ggml_id),
    }[granularity]
    yield replace(base, ggml_id=ggml_id, part="ternary" if fits else "codes")
    if not fits:
        groups = 1 if granularity == "row" else -(-columns // GROUP)
        yield replace(base, name=base.name.removesuffix("weight") + "scale", shape=(rows, groups), part="scale")


def _unpacked_skeleton(config: Any) -> PreTrainedModel:
    """Return the model on the meta device with float matrices, whatever the directory holds."""
    config = copy.deepcopy(config)
    if (form := form_of(config)) is not None:
        config.ternary = asdict(replace(form, packed=False))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def encode(reader: WeightReader, plan: TensorPlan) -> NDArray[Any]:
    """Return a tensor's data as the file holds it: float array, or bytes.

    Raises:
        UserError: if a value or a scale cannot be held.
    """
    if plan.part == "rope":
        return llama3_factors(rope_of(reader.model_config), head_width(reader.model_config))
    if plan.part not in ("float", "adapter"):
        return _encode_matrix(reader, plan)
    tensor = reader.get(plan.source).float()
    if plan.part == "adapter":
        tensor = as_stored(tensor, (form_of(reader.model_config) or TernaryForm()).lrc_dtype)
    values: NDArray[np.float32] = tensor.reshape(plan.shape).contiguous().numpy()
    values = interleave(values, plan.heads) + np.float32(plan.offset)
    data = encode_float(values, plan.ggml_id)
    # The blocks of the quantised types have scales in f16.
    held = np.isfinite(data) if plan.ggml_id in PLAIN else np.abs(values) <= np.finfo(np.float16).max
    if not held.all():
        raise UserError(f"{plan.source} holds values that f16 or f32 cannot: the checkpoint is damaged or out of range")
    return data


def _encode_matrix(reader: WeightReader, plan: TensorPlan) -> NDArray[Any]:
    codes, scales = stored_matrix(reader, plan)
    if plan.part == "scale":
        return scales
    if plan.part == "codes":
        scales = np.ones((1, 1), np.float32)
    if plan.ggml_id == I2_S:
        return encode_i2_s(codes, scales[0, 0])
    if plan.ggml_id == BF16:
        return bf16_bytes(codes * _expand(scales, codes.shape[1], 1))
    rounded = f16_scales(scales, plan.name)
    if plan.ggml_id == F16:
        halves: NDArray[np.float16] = codes.astype(np.float16) * _expand(rounded, codes.shape[1], 1)
        return halves
    kind = BY_ID[plan.ggml_id]
    return kind.encode(codes, _expand(rounded, codes.shape[1], kind.block))


def stored_matrix(reader: WeightReader, plan: TensorPlan) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return a matrix's codes `[rows, columns]` and scales `[1, 1]`, `[rows, 1]` or `[rows, groups]`, rows as in the file."""
    codes, scale = reader.ternary(plan.source)
    scales: NDArray[np.float32] = scale.float().numpy()
    if not np.isfinite(scales).all():
        raise UserError(f"{plan.source} holds values that are no numbers: the checkpoint is damaged")
    if scale.ndim != 2:
        scales = scales.reshape(1, 1)
    if len(scales) > 1:
        scales = interleave(scales, plan.heads)
    return interleave(codes.numpy(), plan.heads), scales


def _expand(scales: NDArray[Any], columns: int, block: int) -> NDArray[Any]:
    """Return one scale for each block of a row where there is one for each 128 columns; else the scales as they are."""
    if scales.shape[1] == 1:
        return scales
    return np.repeat(scales, GROUP // block, axis=1)[:, : columns // block]


def stored_bytes(plan: TensorPlan) -> int:
    """Return how many bytes a tensor takes in the file."""
    count = tensor_bytes(plan.ggml_id, plan.shape)
    assert count is not None
    return count


def expected_metadata(reader: WeightReader, architecture: str = BITNET) -> dict[str, Any]:
    """Return the file's keys and values: int stands for uint32, float for float32, a list for an array."""
    values: dict[str, Any] = {
        f"{architecture}.{key}": value for key, value in model_keys(reader.model_config, architecture).items()
    }
    words = read_tokenizer(reader.directory, reader.model_config.vocab_size).keys()
    values |= {f"tokenizer.{key}": value for key, value in words.items()}
    values[PROVENANCE_KEY] = read_provenance(reader.directory)
    # An empty list has no type that GGUF could write: a tokenizer without merges has none.
    return {"general.architecture": architecture} | {k: v for k, v in values.items() if v is not None and v != []}
