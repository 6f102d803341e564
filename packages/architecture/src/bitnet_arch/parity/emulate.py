"""A torch model that computes what llama.cpp computes for a given file."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from bitnet_arch.checkpoint import load_model
from bitnet_arch.errors import UserError
from bitnet_arch.families import base_type, family_of, quantized_names
from bitnet_arch.gguf.names import deinterleave, gguf_name, rotary_heads
from bitnet_arch.gguf.reader import read_gguf
from bitnet_arch.modeling import form_of
from bitnet_arch.parity.activations import BY_WEIGHT_TYPE, identity
from bitnet_arch.parity.forwards import RoundedLinear, use_half_cache
from bitnet_arch.quant import fake_quant_activation

Activations = Literal["engine", "none", "training"]


def emulated_model(directory: Path | str, gguf_path: Path | str, activations: Activations = "engine") -> PreTrainedModel:
    """Load a model directory with a GGUF file's own matrices and llama.cpp's handling of activations.

    Matrices, embeddings and head are what the file holds, dequantised; norms, biases and configuration are the directory's. Keys
    and values are rounded to f16, as in llama.cpp's cache, and the head's input as for the head's type.

    Args:
        directory: the model directory that the file was made from.
        gguf_path: the file, of a stock architecture.
        activations: "engine" rounds as llama.cpp does for each matrix's type, "training" per token, "none" not at all.

    Raises:
        UserError: for an unknown handling, a model in our own form, or a file that cannot be read or holds other tensors than the
            directory.
    """
    if activations not in get_args(Activations):
        raise UserError(f"unknown activation handling {activations!r}: choose {', '.join(get_args(Activations))}")
    model, written = load_model(directory), read_gguf(gguf_path)
    config: Any = model.config
    if form_of(config) is not None:
        raise UserError(f"{directory} has a form that llama.cpp does not know, so that nothing of it can be emulated")
    family, kind = family_of(config), base_type(config)
    swapped = written.metadata.get("general.architecture") == "llama"

    def stored(source: str, like: nn.Module) -> tuple[torch.Tensor, int]:
        name, shape = gguf_name(kind, source), (int(like.out_features), int(like.in_features))  # type: ignore[arg-type]
        info = written.tensors.get(name)
        if info is None or info.shape != shape:
            raise UserError(f"{gguf_path} has no tensor {name} of shape {list(shape)}: export it from {directory} again")
        values = written.dequantize(name)
        values = deinterleave(values, rotary_heads(config, source)) if swapped else values
        return torch.from_numpy(values.copy()), info.ggml_id

    for name in quantized_names(model):
        module = model.get_submodule(name)
        weight, ggml_id = stored(f"{name}.weight", module)
        engine = BY_WEIGHT_TYPE.get(ggml_id, identity)
        rounding = {"engine": engine, "none": identity, "training": fake_quant_activation}[activations]
        bias = module.bias.detach().float() if isinstance(module.bias, torch.Tensor) else None
        model.set_submodule(name, RoundedLinear(weight, rounding, bias))
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            use_half_cache(module)
    embedding: Any = model.get_submodule(family.embedding)
    head: Any = model.get_submodule(family.head)
    like = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, device="meta")
    table, embedding_type = stored(f"{family.embedding}.weight", like)
    tied = config.tie_word_embeddings
    weight, head_type = (table, embedding_type) if tied else stored(f"{family.head}.weight", head)
    with torch.no_grad():
        embedding.weight.copy_(table)
    model.set_submodule(family.head, RoundedLinear(weight, BY_WEIGHT_TYPE.get(head_type, identity)))
    return model
