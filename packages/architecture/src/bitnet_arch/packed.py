"""`PackedBitLinear`: the 2-bit form of a `BitLinear`, with an exact integer forward in plain torch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.errors import UserError
from bitnet_arch.packing import pack_codes, unpack_codes
from bitnet_arch.quant import ACTIVATION_LEVELS, quantize_activation, quantize_weight

MAX_EXACT_FEATURES = 2**24 // ACTIVATION_LEVELS
"""Up to this width every partial sum of int8 x ternary products is an integer below 2^24, which float32 holds exactly."""


class PackedBitLinear(nn.Module):
    """Ternary linear layer for inference: `y = (q · Tᵀ) · s_x · β + bias`.

    The integer product runs as a float32 matrix product whose every partial sum is an exactly represented integer, so the
    result does not depend on summation order, and equals integer arithmetic for `in_features` up to 132,104.

    Attributes:
        weight: uint8 `[out_features / 4, in_features]`, codes as in `bitnet_arch.packing`.
        weight_scale: float32 `[1]`, β; multiplies to dequantise.
        bias: optional float `[out_features]`.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        """Build the layer from int8 codes `[out, in]`, a float scale and an optional bias `[out]`.

        Raises:
            UserError: if the shape cannot be packed or is too wide for an exact product.
        """
        super().__init__()
        self.out_features, self.in_features = codes.shape
        if self.in_features > MAX_EXACT_FEATURES:
            raise UserError(f"{self.in_features} input features exceed the exact integer limit of {MAX_EXACT_FEATURES}")
        self.register_buffer("weight", pack_codes(codes))
        self.register_buffer("weight_scale", scale.detach().float().reshape(1))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_bitlinear(cls, layer: BitLinear) -> "PackedBitLinear":
        """Quantise and pack a `BitLinear`.

        Raises:
            UserError: if the layer's λ is not 1, which a packed layer cannot express.
        """
        if float(layer.quant_lambda) != 1.0:
            raise UserError(f"a layer with lambda {float(layer.quant_lambda):g} cannot be packed: train it to lambda 1")
        codes, scale = quantize_weight(layer.weight.detach())
        return cls(codes, scale, layer.bias)

    def codes(self) -> Tensor:
        """Return the int8 codes `[out_features, in_features]`."""
        return unpack_codes(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]` in x's dtype."""
        q, activation_scale = quantize_activation(x)
        with torch.autocast(device_type=x.device.type, enabled=False):  # bf16 would round the integers
            y = F.linear(q.float(), self.codes().float()) * (activation_scale * self.weight_scale)
            if self.bias is not None:
                y = y + self.bias.float()
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the layer's shape."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def pack_model(model: nn.Module) -> nn.Module:
    """Replace every `BitLinear` of `model` by a `PackedBitLinear`, in place, and return the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BitLinear):
            model.set_submodule(name, PackedBitLinear.from_bitlinear(module))
    return model
