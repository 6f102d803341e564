"""`PackedBitLinear`: the 2-bit form of a `BitLinear`, with an exact integer forward in plain torch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.errors import UserError
from bitnet_arch.hadamard import rotate
from bitnet_arch.norm import SubLN
from bitnet_arch.packing import CODES_PER_BYTE, pack_codes, unpack_codes
from bitnet_arch.quant import ACTIVATION_LEVELS, GROUP, expand_scale, quantize_activation, quantize_weight

MAX_EXACT_FEATURES = 2**24 // ACTIVATION_LEVELS
"""Up to this width every partial sum of int8 x ternary products is an integer below 2^24, which float32 holds exactly."""


class PackedBitLinear(nn.Module):
    """Ternary linear layer for inference: `y = (q · Tᵀ) · s_x · β + bias`, after the input's norm and rotation, if it has any.

    With one scale for the matrix or a row, the integer product runs as a float32 matrix product whose every partial sum is an
    exactly represented integer, so the result does not depend on summation order, and equals integer arithmetic for
    `in_features` up to 132,104. With a scale for every 128 columns the sums are of scaled integers, in float32.

    Attributes:
        weight: uint8 `[out_features / 4, in_features]`, codes as in `bitnet_arch.packing`.
        weight_scale: float32 `[1]`, `[out_features, 1]` or `[out_features, ceil(in_features / 128)]`, β; multiplies to dequantise.
        bias: optional float `[out_features]`.
        in_norm: RMSNorm of the input, or None.
        rotation: whether the input is rotated before it is quantised.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    in_norm: SubLN | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        in_norm: SubLN | None = None,
        rotation: bool = False,
    ) -> None:
        """Build the layer from int8 codes `[out, in]`, a float scale of `absmean_scale`'s shapes and an optional bias `[out]`.

        Raises:
            UserError: if the shape cannot be packed or is too wide for an exact product.
        """
        super().__init__()
        self._set_shape(*codes.shape)
        self.register_buffer("weight", pack_codes(codes))
        self.register_buffer("weight_scale", scale.detach().float().reshape(scale.shape if scale.ndim == 2 else (1,)))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.in_norm, self.rotation = in_norm, rotation

    @classmethod
    def from_bitlinear(cls, layer: BitLinear) -> "PackedBitLinear":
        """Quantise and pack a `BitLinear`; its norm is shared.

        Raises:
            UserError: if the layer's λ is not 1, which a packed layer cannot express.
        """
        if float(layer.quant_lambda) != 1.0:
            raise UserError(f"a layer with lambda {float(layer.quant_lambda):g} cannot be packed: train it to lambda 1")
        codes, scale = quantize_weight(layer.weight.detach(), layer.granularity)
        return cls(codes, scale, layer.bias, in_norm=layer.in_norm, rotation=layer.rotation)

    @classmethod
    def like(cls, layer: BitLinear) -> "PackedBitLinear":
        """Return a packed layer of the same shape and form on the meta device, to load a state dict into.

        Raises:
            UserError: if the shape cannot be packed or is too wide for an exact product.
        """
        rows, columns = layer.out_features, layer.in_features
        if rows % CODES_PER_BYTE:
            raise UserError(f"a packed weight needs rows divisible by {CODES_PER_BYTE}, not {rows}: save the master form")
        packed = cls.__new__(cls)
        nn.Module.__init__(packed)
        packed._set_shape(rows, columns)
        groups = -(-columns // GROUP)
        shape = {"tensor": (1,), "row": (rows, 1), "group128": (rows, groups)}[layer.granularity]
        packed.register_buffer("weight", torch.empty(rows // CODES_PER_BYTE, columns, dtype=torch.uint8, device="meta"))
        packed.register_buffer("weight_scale", torch.empty(shape, device="meta"))
        packed.register_buffer("bias", None if layer.bias is None else torch.empty(rows, device="meta"))
        packed.in_norm, packed.rotation = layer.in_norm, layer.rotation
        return packed

    def _set_shape(self, rows: int, columns: int) -> None:
        self.out_features, self.in_features = rows, columns
        if columns > MAX_EXACT_FEATURES:
            raise UserError(f"{columns} input features exceed the exact integer limit of {MAX_EXACT_FEATURES}")

    def codes(self) -> Tensor:
        """Return the int8 codes `[out_features, in_features]`."""
        return unpack_codes(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]` in x's dtype."""
        if self.in_norm is not None:
            x = self.in_norm(x)
        if self.rotation:
            x = rotate(x)
        q, activation_scale = quantize_activation(x)
        with torch.autocast(device_type=x.device.type, enabled=False):  # bf16 would round the integers
            codes = self.codes().float()
            if self.weight_scale.ndim == 2 and self.weight_scale.shape[1] > 1:
                y = F.linear(q.float(), codes * expand_scale(self.weight_scale, self.in_features)) * activation_scale
            else:
                y = F.linear(q.float(), codes) * (activation_scale * self.weight_scale.flatten())
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
