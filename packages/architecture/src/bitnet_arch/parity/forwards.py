"""The ways in which the gate computes one model, each as a frozen description, and the layers they are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.packed import PackedBitLinear
from bitnet_arch.parity.activations import BY_WEIGHT_TYPE, Rounding, identity
from bitnet_arch.quant import fake_quant_activation

ONE_ULP = 2.0**-23


@dataclass(frozen=True)
class TernaryWeight:
    """One quantised matrix.

    Attributes:
        codes: int8 `[out, in]`.
        scale: 0-dim float32 that multiplies them.
        master: the float matrix `[out, in]` they were made of; None in a packed directory.
        ggml_id: its type in the GGUF file.
    """

    codes: Tensor
    scale: Tensor
    master: Tensor | None
    ggml_id: int

    def dequantized(self) -> Tensor:
        """Return codes x scale, float32, as training computes it."""
        return self.codes.float() * self.scale

    def stored(self) -> Tensor:
        """Return codes x scale rounded to f16, float32, as a GGUF file holds it."""
        return self.codes.float() * self.scale.half().float()


class RoundedLinear(nn.Module):
    """A linear layer with fixed weights whose input is rounded first.

    Attributes:
        weight: float `[out, in]`.
        rounding: applied to the input.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, rounding: Rounding) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]` in x's dtype."""
        return F.linear(self.rounding(x), self.weight)


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


@dataclass(frozen=True)
class Forward:
    """One way to compute the model.

    Attributes:
        linear: builds the layer that stands for a quantised matrix.
        dtype: of the residual stream and the layers.
        half_embedding: whether embeddings (and a tied head) are rounded to f16, as a GGUF file stores them.
        half_cache: whether keys and values are rounded to f16, as in llama.cpp's cache.
        noise_seed: if given, every quantised layer's input is perturbed by one unit in the last place.
    """

    linear: LinearBuilder
    dtype: torch.dtype = torch.float32
    half_embedding: bool = False
    half_cache: bool = False
    noise_seed: int | None = None


def training_linear(weight: TernaryWeight) -> nn.Module:
    """Return what training computes: `BitLinear`, or for a packed directory the same product with its fixed matrix."""
    if weight.master is None:
        return RoundedLinear(weight.dequantized(), fake_quant_activation)
    layer = BitLinear(weight.master.shape[1], weight.master.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.master.float(), requires_grad=False)
    layer.quant_lambda = torch.ones(())
    return layer


def packed_linear(weight: TernaryWeight) -> nn.Module:
    """Return the exact integer layer."""
    return PackedBitLinear(weight.codes, weight.scale)


def unrounded_linear(weight: TernaryWeight) -> nn.Module:
    """Return training's layer without activation quantisation: a control."""
    return RoundedLinear(weight.dequantized(), identity)


def emulated_linear(weight: TernaryWeight) -> nn.Module:
    """Return what llama.cpp computes for the matrix's type in the file."""
    return RoundedLinear(weight.stored(), BY_WEIGHT_TYPE[weight.ggml_id])


def emulated_unrounded_linear(weight: TernaryWeight) -> nn.Module:
    """Return the file's matrix without activation quantisation: a control."""
    return RoundedLinear(weight.stored(), identity)


def emulated_q4_0_linear(weight: TernaryWeight) -> nn.Module:
    """Return what llama.cpp would compute had the matrix gone through Q4_0: a control (one sign of each block loses an eighth)."""
    blocks = weight.stored().unflatten(-1, (-1, 32)) if weight.codes.shape[1] % 32 == 0 else weight.stored().unsqueeze(-2)
    extreme = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
    distorted = torch.where(blocks * extreme < 0, blocks * 0.875, blocks)
    return RoundedLinear(distorted.flatten(-2), BY_WEIGHT_TYPE[weight.ggml_id])


PERTURBATIONS = 3

FORWARDS: dict[str, Forward] = {
    "training": Forward(training_linear),
    "training in float64": Forward(training_linear, dtype=torch.float64),
    **{f"training perturbed {seed}": Forward(training_linear, noise_seed=seed) for seed in range(PERTURBATIONS)},
    "training without activation quantisation": Forward(unrounded_linear),
    "packed": Forward(packed_linear),
    "emulated": Forward(emulated_linear, half_embedding=True, half_cache=True),
    "emulated with float32 cache": Forward(emulated_linear, half_embedding=True),
    "emulated without activation quantisation": Forward(emulated_unrounded_linear, half_embedding=True, half_cache=True),
    "emulated with Q4_0": Forward(emulated_q4_0_linear, half_embedding=True, half_cache=True),
}
"""What the gate computes, by name. All come from the model directory, none from the file, so that a wrong file cannot widen
its own bounds."""
