"""A torch model that computes what llama.cpp computes for a given file."""

from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from bitnet_arch.checkpoint import load_model
from bitnet_arch.convert import is_quantized_linear
from bitnet_arch.errors import UserError
from bitnet_arch.gguf.plan import LAYER_NAMES
from bitnet_arch.gguf.reader import read_gguf
from bitnet_arch.gguf.types import BY_ID
from bitnet_arch.parity.activations import BY_WEIGHT_TYPE, identity
from bitnet_arch.parity.forwards import RoundedLinear, use_half_cache
from bitnet_arch.quant import fake_quant_activation

Activations = Literal["engine", "none", "training"]


def emulated_model(directory: Path | str, gguf_path: Path | str, activations: Activations = "engine") -> PreTrainedModel:
    """Load a model directory with a GGUF file's own matrices and llama.cpp's handling of activations.

    Matrices and embeddings are what the file holds, dequantised; norms and configuration are the directory's. Keys and values
    are rounded to f16, as in llama.cpp's cache.

    Args:
        directory: the model directory that the file was made from.
        gguf_path: the file.
        activations: "engine" rounds as llama.cpp does for each matrix's type, "training" per token, "none" not at all.

    Raises:
        UserError: for an unknown handling, or a file that cannot be read or holds other tensors than the directory.
    """
    if activations not in get_args(Activations):
        raise UserError(f"unknown activation handling {activations!r}: choose {', '.join(get_args(Activations))}")
    model, written = load_model(directory), read_gguf(gguf_path)

    def matrix(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        info = written.tensors.get(name)
        if info is None or info.shape != shape:
            raise UserError(f"{gguf_path} has no tensor {name} of shape {list(shape)}: export it from {directory} again")
        return torch.from_numpy(written.dequantize(name).copy())

    for name, module in list(model.named_modules()):
        if is_quantized_linear(name):
            _, _, index, short = name.split(".", 3)
            gguf_name = f"blk.{index}.{LAYER_NAMES[short]}.weight"
            weight = matrix(gguf_name, (int(module.out_features), int(module.in_features)))  # type: ignore[arg-type]
            ggml_id = written.tensors[gguf_name].ggml_id
            engine = BY_WEIGHT_TYPE[ggml_id] if ggml_id in BY_ID else identity
            rounding = {"engine": engine, "none": identity, "training": fake_quant_activation}[activations]
            model.set_submodule(name, RoundedLinear(weight, rounding))
        elif name.endswith("self_attn"):
            use_half_cache(module)
    embedding: torch.nn.Embedding = model.get_input_embeddings()  # type: ignore[assignment]
    with torch.no_grad():
        embedding.weight.copy_(matrix("token_embd.weight", tuple(embedding.weight.shape)))
    return model
