"""`PackedBitLinear`: the 2-bit form of a `BitLinear`, with an exact integer forward in plain torch.

`PackedBitLinearLRC` is the same with low-rank adapters, which can be trained on top of the 2-bit weights.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_arch import kernel_ops
from bitnet_arch.bitlinear import BitLinear, BitLinearLRC
from bitnet_arch.errors import UserError
from bitnet_arch.hadamard import rotate
from bitnet_arch.lrc.adapters import AdapterDtype, check_adapters, correction, random_adapters
from bitnet_arch.norm import SubLN
from bitnet_arch.packing import CODES_PER_BYTE, check_packed, code_planes, pack_codes, unpack_codes
from bitnet_arch.quant import (
    ACTIVATION_LEVELS,
    GROUP,
    _straight_through,
    expand_scale,
    fake_quant_activation,
    quantize_activation,
    quantize_weight,
)

MAX_EXACT_FEATURES = 2**24 // ACTIVATION_LEVELS
"""Up to this width every partial sum of int8 x ternary products is an integer below 2^24, which float32 holds exactly."""


class PackedBitLinear(nn.Module):
    """Ternary linear layer of 2-bit weights: `y = (q · Tᵀ) · s_x · β + bias`, after the input's norm and rotation, if it has any.

    With one scale for the matrix or a row, the integer product runs as a float32 matrix product whose every partial sum is an
    exactly represented integer, so the result does not depend on summation order, and equals integer arithmetic for
    `in_features` up to 132,104. With a scale for every 128 columns the sums are of scaled integers, in float32.

    On the CPU the product is that of `bitnet_arch.kernel_ops`, where the package `bitnet-kernels` is installed.

    Nothing in it is trained, but a gradient passes to its input, straight through the rounding as in `BitLinear`, so that adapters
    and layers below it can be.

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
        """Quantise and pack a `BitLinear`; its norm is shared. Of a `BitLinearLRC`, the result is a `PackedBitLinearLRC`.

        Raises:
            UserError: if the layer's λ is not 1, which a packed layer cannot express.
        """
        if float(layer.quant_lambda) != 1.0:
            raise UserError(f"a layer with lambda {float(layer.quant_lambda):g} cannot be packed: train it to lambda 1")
        codes, scale = quantize_weight(layer.weight.detach(), layer.granularity)
        packed = PackedBitLinear(codes, scale, layer.bias, in_norm=layer.in_norm, rotation=layer.rotation)
        return PackedBitLinearLRC.of(packed, layer) if isinstance(layer, BitLinearLRC) else packed

    @classmethod
    def like(cls, layer: BitLinear) -> "PackedBitLinear":
        """Return a packed layer of the same shape and form on the meta device, to load a state dict into.

        Raises:
            UserError: if the shape cannot be packed or is too wide for an exact product.
        """
        rows, columns = layer.out_features, layer.in_features
        if rows % CODES_PER_BYTE:
            raise UserError(f"a packed weight needs rows divisible by {CODES_PER_BYTE}, not {rows}: save the master form")
        packed = PackedBitLinear.__new__(PackedBitLinear)
        nn.Module.__init__(packed)
        packed._set_shape(rows, columns)
        groups = -(-columns // GROUP)
        shape = {"tensor": (1,), "row": (rows, 1), "group128": (rows, groups)}[layer.granularity]
        packed.register_buffer("weight", torch.empty(rows // CODES_PER_BYTE, columns, dtype=torch.uint8, device="meta"))
        packed.register_buffer("weight_scale", torch.empty(shape, device="meta"))
        packed.register_buffer("bias", None if layer.bias is None else torch.empty(rows, device="meta"))
        packed.in_norm, packed.rotation = layer.in_norm, layer.rotation
        return PackedBitLinearLRC.of(packed, layer) if isinstance(layer, BitLinearLRC) else packed

    def _set_shape(self, rows: int, columns: int) -> None:
        self.out_features, self.in_features = rows, columns
        kernel_ops.check_environment()
        if columns > MAX_EXACT_FEATURES:
            raise UserError(f"{columns} input features exceed the exact integer limit of {MAX_EXACT_FEATURES}")

    def codes(self) -> Tensor:
        """Return the int8 codes `[out_features, in_features]`, checked."""
        return unpack_codes(self.weight)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.weight.is_meta:
            check_packed(self.weight)  # here and not in the forward, where a GPU would wait for it in every layer

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]` in x's dtype."""
        return self.product(self.prepare(x))

    def prepare(self, x: Tensor) -> Tensor:
        """Return what the activation quantiser rounds: the input after its norm and rotation, if the layer has any."""
        if self.in_norm is not None:
            x = self.in_norm(x)
        return rotate(x) if self.rotation else x

    def product(self, x: Tensor) -> Tensor:
        """Quantise a prepared input and multiply it; the input's gradient goes straight through the rounding of activations."""
        if kernel_ops.applies(x, self.weight):
            return kernel_ops.ternary_linear(x, self.weight, self.weight_scale, self.bias)
        with torch.no_grad():
            y = self._integer_product(x)
        if torch.is_grad_enabled() and x.requires_grad:
            # The integer product has no gradient; this one has, and its value is the integer product's, bit for bit.
            weight = torch.cat(code_planes(self.weight)) * expand_scale(self.weight_scale, self.in_features)
            y = _straight_through(F.linear(fake_quant_activation(x), weight.to(x.dtype)), y)
        return y

    def _integer_product(self, x: Tensor) -> Tensor:
        q, activation_scale = quantize_activation(x)
        with torch.autocast(device_type=x.device.type, enabled=False):  # bf16 would round the integers
            q, planes = q.float(), code_planes(self.weight)
            if self.weight_scale.ndim == 2 and self.weight_scale.shape[1] > 1:
                weight = torch.cat(planes).float() * expand_scale(self.weight_scale, self.in_features)
                y = F.linear(q, weight) * activation_scale
            else:
                # A quarter of the matrix at a time, which stays in the cache: the sums are exact however they are cut.
                y = torch.cat([F.linear(q, plane.float()) for plane in planes], dim=-1)
                y = y * (activation_scale * self.weight_scale.flatten())
            if self.bias is not None:
                y = y + self.bias.float()
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the layer's shape."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedBitLinearLRC(PackedBitLinear):
    """A `PackedBitLinear` with a low-rank correction, as `bitnet_arch.bitlinear.BitLinearLRC` describes it.

    Only the adapters are parameters, and can be trained while the 2-bit weights stay as they are. The gradient of the input goes
    through the correction, too.

    Attributes:
        lrc_u: U, `[out_features, rank]`.
        lrc_v: V, `[in_features, rank]`.
        lrc_dtype: what the adapters are stored in.
    """

    lrc_u: nn.Parameter
    lrc_v: nn.Parameter

    def __init__(self, base: PackedBitLinear, u: Tensor, v: Tensor, lrc_dtype: AdapterDtype = "float16") -> None:
        """Take over a layer's weights and norm, which are shared, and add adapters.

        Args:
            base: the layer to correct.
            u: U, `[out_features, rank]`, floating point.
            v: V, `[in_features, rank]`, floating point.
            lrc_dtype: "float16" or "int8".

        Raises:
            UserError: for adapters that do not fit, or U = V = 0, which no training could move.
        """
        nn.Module.__init__(self)
        self._set_shape(base.out_features, base.in_features)
        check_adapters(u, v, self.in_features, self.out_features)
        for name in ("weight", "weight_scale", "bias"):
            self.register_buffer(name, getattr(base, name))
        self.in_norm, self.rotation = base.in_norm, base.rotation
        self.lrc_u, self.lrc_v = nn.Parameter(u.contiguous()), nn.Parameter(v.contiguous())
        self.lrc_dtype: AdapterDtype = lrc_dtype
        self.train(base.training)

    @classmethod
    def of(cls, base: PackedBitLinear, layer: BitLinearLRC) -> "PackedBitLinearLRC":
        """Return a packed layer with another's adapters: shared, not copied."""
        packed = cls(base, layer.lrc_u.data, layer.lrc_v.data, layer.lrc_dtype)
        packed.lrc_u, packed.lrc_v = layer.lrc_u, layer.lrc_v
        return packed

    @classmethod
    def random(cls, base: PackedBitLinear, rank: int, lrc_dtype: AdapterDtype = "float16") -> "PackedBitLinearLRC":
        """Add adapters that change nothing yet: U = 0, V ~ N(0, 1 / in). Training them starts with U alone."""
        return cls(base, *random_adapters(rank, base.in_features, base.out_features, base.weight.device), lrc_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]` in x's dtype."""
        x = self.prepare(x)
        y = self.product(x)
        if not (kernel_ops.applies(x, self.weight) and kernel_ops.corrects(y, x)):
            return y + correction(x, self.lrc_u, self.lrc_v, self.lrc_dtype)
        with torch.no_grad():
            corrected = kernel_ops.low_rank_corrected(y, x, self.lrc_u, self.lrc_v, self.lrc_dtype)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (y, self.lrc_u, self.lrc_v)):
            return _straight_through(y + correction(x, self.lrc_u, self.lrc_v, self.lrc_dtype), corrected)
        return corrected


def pack_model(model: nn.Module) -> nn.Module:
    """Replace every `BitLinear` of `model` by a `PackedBitLinear`, in place, and return the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BitLinear):
            model.set_submodule(name, PackedBitLinear.from_bitlinear(module))
    return model
