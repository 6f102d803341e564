"""The ways in which the gate computes one model, each as a frozen description, and the layers they are made of."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.gguf.types import BF16, I2_S
from bitnet_arch.hadamard import rotate
from bitnet_arch.lrc.adapters import AdapterDtype, as_stored, correction
from bitnet_arch.norm import SubLN
from bitnet_arch.packed import PackedBitLinear
from bitnet_arch.parity.activations import BY_WEIGHT_TYPE, Rounding, identity
from bitnet_arch.quant import Granularity, expand_scale, fake_quant_activation

ONE_ULP = 2.0**-23


@dataclass(frozen=True, kw_only=True)
class Dress:
    """What a ternary layer of our own form does around its product.

    Attributes:
        in_norm: the norm of its input, or None.
        rotation: whether the input is rotated.
        adapters: U `[out, rank]` and V `[in, rank]` of its low-rank correction and what they are stored in, or None.
    """

    in_norm: SubLN | None = None
    rotation: bool = False
    adapters: tuple[Tensor, Tensor, AdapterDtype] | None = None

    def __bool__(self) -> bool:
        """Whether it does anything."""
        return self.in_norm is not None or self.rotation or self.adapters is not None

    def stored(self) -> "Dress":
        """Return what a GGUF file holds of it: adapters in f16, int8 ones as what their codes stand for."""
        if self.adapters is None:
            return self
        u, v, dtype = self.adapters
        return replace(self, adapters=(as_stored(u, dtype).half().float(), as_stored(v, dtype).half().float(), "float16"))


@dataclass(frozen=True)
class TernaryWeight:
    """One quantised matrix, and what surrounds its product.

    Attributes:
        codes: int8 `[out, in]`.
        scale: float32 that multiplies them, in a shape of `bitnet_arch.quant.absmean_scale`.
        master: the float matrix `[out, in]` they were made of; None in a packed directory.
        ggml_id: its type in the GGUF file.
        bias: float32 `[out]`, or None.
        granularity: how many weights share a scale.
        dress: what surrounds the product.
    """

    codes: Tensor
    scale: Tensor
    master: Tensor | None
    ggml_id: int
    bias: Tensor | None = None
    granularity: Granularity = "tensor"
    dress: Dress = Dress()

    def dequantized(self) -> Tensor:
        """Return codes x scale, float32, as training computes it."""
        return self.codes.float() * expand_scale(self.scale, self.codes.shape[1])

    def stored(self) -> Tensor:
        """Return codes x scale, float32, as a GGUF file holds it: scales in f16, of BF16 products in bf16, of I2_S as they are."""
        if self.ggml_id == I2_S:
            return self.dequantized()
        if self.ggml_id == BF16:
            return self.dequantized().bfloat16().float()
        return self.codes.float() * expand_scale(self.scale.half().float(), self.codes.shape[1])


class RoundedLinear(nn.Module):
    """A linear layer with fixed weights whose input is rounded first.

    Attributes:
        weight: float `[out, in]`.
        rounding: applied to the input.
        bias: float `[out]`, or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, rounding: Rounding, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]` in x's dtype."""
        return F.linear(self.rounding(x), self.weight, self.bias)


class Dressed(nn.Module):
    """A product with a layer's norm, rotation and low-rank correction around it, in the order of `BitLinear` and `BitLinearLRC`.

    Attributes:
        core: the product.
        dress: what surrounds it.
    """

    def __init__(self, core: nn.Module, dress: Dress) -> None:
        super().__init__()
        self.core, self.in_norm, self.rotation = core, dress.in_norm, dress.rotation
        self.lrc_dtype: AdapterDtype = dress.adapters[2] if dress.adapters else "float16"
        self.register_buffer("lrc_u", dress.adapters[0] if dress.adapters else None)
        self.register_buffer("lrc_v", dress.adapters[1] if dress.adapters else None)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]` in x's dtype."""
        if self.in_norm is not None:
            x = self.in_norm(x)
        if self.rotation:
            x = rotate(x)
        y: Tensor = self.core(x)
        if isinstance(self.lrc_u, Tensor) and isinstance(self.lrc_v, Tensor):
            y = y + correction(x, self.lrc_u, self.lrc_v, self.lrc_dtype)
        return y


class Perturbed(nn.Module):
    """Another layer, after noise of one float32 unit in the last place on its input."""

    def __init__(self, layer: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.layer, self.generator = layer, generator

    def forward(self, x: Tensor) -> Any:
        """Map what the wrapped layer maps."""
        return self.layer(x * (1.0 + ONE_ULP * torch.randn(x.shape, generator=self.generator, dtype=x.dtype)))


class HalfCache:
    """Stands for an engine's f16 cache of keys and values: hands them back rounded to f16."""

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Return both rounded to f16, in their dtype and shape `[batch, heads, time, head_dim]`."""
        return keys.half().to(keys.dtype), values.half().to(values.dtype)


def use_half_cache(attention: nn.Module) -> None:
    """Make an attention module of `transformers` see keys and values as an f16 cache returns them."""

    def insert(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, keywords | {"past_key_values": HalfCache()}

    attention.register_forward_pre_hook(insert, with_kwargs=True)


LinearBuilder = Callable[[TernaryWeight], nn.Module]
"""Builds the product of a quantised matrix, without its dress."""


@dataclass(frozen=True)
class Forward:
    """One way to compute the model.

    Attributes:
        linear: builds the layer that stands for a quantised matrix.
        dtype: of the residual stream and the layers.
        stored_embedding: whether embeddings and head are rounded as the GGUF file's types for them do.
        rounded_head: whether the head's input is rounded as llama.cpp does for the head's type.
        stored_adapters: whether a low-rank correction is as the GGUF file holds it.
        half_cache: whether keys and values are rounded to f16, as in llama.cpp's cache.
        noise_seed: if given, every quantised layer's input is perturbed by one unit in the last place.
    """

    linear: LinearBuilder
    dtype: torch.dtype = torch.float32
    stored_embedding: bool = False
    rounded_head: bool = False
    stored_adapters: bool = False
    half_cache: bool = False
    noise_seed: int | None = None


class Late(nn.Module):
    """A quantised matrix's layer as a forward computes it, built when it is called: one matrix of a block at a time is float.

    Attributes:
        way: the forward.
        matrix: the matrix.
        record: given what enters the product, inside the dress; None if nobody asks.
    """

    def __init__(self, way: Forward, matrix: TernaryWeight, record: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self.way, self.matrix, self.record = way, matrix, record

    def forward(self, x: Tensor) -> Any:
        """Map `[..., in]` to `[..., out]` in x's dtype."""
        layer, record = self.way.linear(self.matrix), self.record
        if record is not None:
            layer.register_forward_pre_hook(lambda _, inputs: record(inputs[0]))
        if dress := self.matrix.dress.stored() if self.way.stored_adapters else self.matrix.dress:
            layer = Dressed(layer, copy.deepcopy(dress))  # its norm takes the forward's dtype
        return layer.to(self.way.dtype)(x)


def training_linear(weight: TernaryWeight) -> nn.Module:
    """Return what training computes: `BitLinear`, or for a packed directory the same product with its fixed matrix."""
    if weight.master is None:
        return RoundedLinear(weight.dequantized(), fake_quant_activation, weight.bias)
    rows, columns = weight.master.shape
    layer = BitLinear(columns, rows, bias=False, device="meta", granularity=weight.granularity)
    layer.weight = nn.Parameter(weight.master.float(), requires_grad=False)
    if weight.bias is not None:
        layer.bias = nn.Parameter(weight.bias, requires_grad=False)
    layer.quant_lambda = torch.ones(())
    return layer


def packed_linear(weight: TernaryWeight) -> nn.Module:
    """Return the exact integer layer."""
    return PackedBitLinear(weight.codes, weight.scale, weight.bias)


def unrounded_linear(weight: TernaryWeight) -> nn.Module:
    """Return training's layer without activation quantisation: a control."""
    return RoundedLinear(weight.dequantized(), identity, weight.bias)


def emulated_linear(weight: TernaryWeight) -> nn.Module:
    """Return what llama.cpp computes for the matrix's type in the file."""
    return RoundedLinear(weight.stored(), BY_WEIGHT_TYPE[weight.ggml_id], weight.bias)


def emulated_unrounded_linear(weight: TernaryWeight) -> nn.Module:
    """Return the file's matrix without activation quantisation: a control."""
    return RoundedLinear(weight.stored(), identity, weight.bias)


def emulated_q4_0_linear(weight: TernaryWeight) -> nn.Module:
    """Return what llama.cpp would compute had the matrix gone through Q4_0: a control."""
    return RoundedLinear(_q4_0(weight.stored()), BY_WEIGHT_TYPE[weight.ggml_id], weight.bias)


def file_linear(weight: TernaryWeight) -> nn.Module:
    """Return training's product with the matrix as the file holds it, which is what the native engine computes."""
    return RoundedLinear(weight.stored(), fake_quant_activation, weight.bias)


def file_q4_0_linear(weight: TernaryWeight) -> nn.Module:
    """Return what the native engine would compute had the matrix gone through Q4_0: a control."""
    return RoundedLinear(_q4_0(weight.stored()), fake_quant_activation, weight.bias)


def _q4_0(values: Tensor) -> Tensor:
    """Return a ternary matrix after Q4_0, in which one sign of each block loses an eighth."""
    blocks = values.unflatten(-1, (-1, 32)) if values.shape[1] % 32 == 0 else values.unsqueeze(-2)
    extreme = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
    return torch.where(blocks * extreme < 0, blocks * 0.875, blocks).flatten(-2)


PERTURBATIONS = 3

TRAINING: dict[str, Forward] = {
    "training": Forward(training_linear),
    "training in float64": Forward(training_linear, dtype=torch.float64),
    **{f"training perturbed {seed}": Forward(training_linear, noise_seed=seed) for seed in range(PERTURBATIONS)},
    "training without activation quantisation": Forward(unrounded_linear),
    "packed": Forward(packed_linear),
}
"""What needs no engine."""

STORED: dict[str, Forward] = {"training with the file's embeddings": Forward(training_linear, stored_embedding=True)}
"""What an engine is compared with where a file's embeddings are quantised."""

EMULATED: dict[str, Forward] = {
    "emulated": Forward(emulated_linear, stored_embedding=True, rounded_head=True, half_cache=True),
    "emulated with float32 cache": Forward(emulated_linear, stored_embedding=True, rounded_head=True),
    "emulated without activation quantisation": Forward(
        emulated_unrounded_linear, stored_embedding=True, rounded_head=True, half_cache=True
    ),
    "emulated with Q4_0": Forward(emulated_q4_0_linear, stored_embedding=True, rounded_head=True, half_cache=True),
}
"""What stands for llama.cpp, and what it is told from."""

FILE: dict[str, Forward] = {
    "file": Forward(file_linear, stored_embedding=True, stored_adapters=True),
    "file without activation quantisation": Forward(emulated_unrounded_linear, stored_embedding=True, stored_adapters=True),
    "file with Q4_0": Forward(file_q4_0_linear, stored_embedding=True, stored_adapters=True),
}
"""What stands for an engine that computes training's own forward of the file's values, and what it is told from."""

FORWARDS: dict[str, Forward] = TRAINING | STORED | EMULATED | FILE
"""What the gate computes, by name. All come from the model directory, and of the file only its tensors' types, so that a wrong file
cannot widen its own bounds."""
