"""`bitnet-kernels` as a torch operator: what `PackedBitLinear` multiplies with on the CPU, if the package is installed.

`torch.ops.bitnet.ternary_linear(x, weight, weight_scale, bias)` has a fake implementation and a gradient, so that compiled graphs
keep it whole. Its results are those of `PackedBitLinear` in plain torch, bit for bit with one scale for the matrix or a row; with a
scale for every 128 columns, sums over groups are taken in another order.

The environment variable `WF_KERNELS` says whether it is used: `auto` (or nothing) where the package is installed and has vector
kernels for this processor, `on` always (and an error without the package), `off` never. `use_kernels` says the same while a program
runs. Products run on the threads of `bitnet_kernels.set_threads`, not on torch's.

A layer's weight stays in its own layout, in 2 bits. The kernels' layout of it, 2 bits more, is made at the first product and kept
beside it as long as the tensor lives; it is made again when the tensor or its scale has changed, which torch counts, unless it
was changed through `tensor.data`.
"""

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from bitnet_arch.errors import UserError
from bitnet_arch.lrc.adapters import int8_adapter
from bitnet_arch.packing import CODES_PER_BYTE, check_packed, code_planes
from bitnet_arch.quant import expand_scale

try:
    import bitnet_kernels
    from bitnet_kernels.low_rank import LowRank
except ModuleNotFoundError as error:
    if error.name != "bitnet_kernels":
        raise
    bitnet_kernels = None  # type: ignore[assignment]
    _refused = None
except ValueError as error:  # a WF_ISA or WF_THREADS that cannot be: said where something is computed, `check_environment`
    bitnet_kernels = None  # type: ignore[assignment]
    _refused = str(error)
else:
    _refused = None

Switch = Literal["auto", "on", "off"]

_switch = os.environ.get("WF_KERNELS") or "auto"


def use_kernels(switch: Switch) -> None:
    """Say whether packed layers use `bitnet-kernels` from here on, see the module.

    Raises:
        UserError: for another word, or for "on" where the package is missing.
    """
    global _switch
    _check(switch)
    _switch = switch


def check_environment() -> None:
    """Refuse a `WF_KERNELS`, `WF_ISA` or `WF_THREADS` that cannot be followed: where layers are built and engines are opened.

    Raises:
        UserError: as `use_kernels`, or for a variable that `bitnet-kernels` refuses.
    """
    if _refused is not None:
        raise UserError(_refused)
    _check(_switch)


def _check(switch: str) -> None:
    if switch not in get_args(Switch):
        raise UserError(f"WF_KERNELS is one of {', '.join(get_args(Switch))}, not {switch!r:.60}")
    if switch == "on" and bitnet_kernels is None:
        raise UserError("WF_KERNELS=on needs the package bitnet-kernels: install bitnet-arch[kernels]")


def applies(x: Tensor, weight: Tensor) -> bool:
    """Return whether a product is one for the kernels: ordinary tensors on the CPU, and nothing that needs torch's own operators.

    Args:
        x: the input.
        weight: packed codes.
    """
    if bitnet_kernels is None or _switch == "off" or x.device.type != "cpu" or weight.device.type != "cpu":
        return False
    if _switch == "auto" and bitnet_kernels.isa() == "scalar":
        return False
    if torch.compiler.is_compiling():
        return True
    # A tensor made in inference mode does not count its changes, and sharded or fake ones have no memory to read.
    ordinary = type(weight) is Tensor and type(x) in (Tensor, torch.nn.Parameter) and not weight.is_inference()
    return ordinary and not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def ternary_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `quantised(x) · Wᵀ + bias` by the kernels. The gradient of x goes straight through its rounding; nothing else has one.

    Args:
        x: `[..., in]`, floating point.
        weight: uint8 `[out / 4, in]`, codes as in `bitnet_arch.packing`.
        weight_scale: `[1]`, `[out, 1]` or `[out, ceil(in / 128)]`; multiplies to dequantise.
        bias: `[out]`, added in float32.

    Returns:
        `[..., out]` in x's dtype; NaN for tokens that hold a NaN or an infinity.

    Raises:
        UserError: for codes outside {-1, 0, 1}, or tensors that do not fit each other.
    """
    y: Tensor = _operator(x, weight, weight_scale, bias)
    return y


def corrects(y: Tensor, x: Tensor) -> bool:
    """Return whether the kernels add a low-rank correction as torch does: in float32.

    Args:
        y: the product.
        x: its input.
    """
    return x.dtype == y.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)


def low_rank_corrected(y: Tensor, x: Tensor, u: Tensor, v: Tensor, dtype: str) -> Tensor:
    """Return `y + U Vᵀ x` by the kernels, with adapters as they are stored. It has no gradient: asking for one is an error.

    Args:
        y: float32 `[..., out]`.
        x: float32 `[..., in]`.
        u: `[out, rank]`, floating point.
        v: `[in, rank]`, floating point.
        dtype: what adapters are stored in, as in `bitnet_arch.lrc.adapters`.

    Raises:
        UserError: for tensors of other types, or that do not fit each other.
    """
    corrected: Tensor = torch.ops.bitnet.low_rank_corrected.default(y, x, u, v, dtype)
    return corrected


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What was made of two tensors for the kernels, with aliases of them: their memory is not given away while this lives."""

    owner: weakref.ref[Tensor]
    aliases: tuple[Tensor, Tensor]
    made_from: tuple[object, ...]
    made: Any


_prepared: dict[int, _Prepared] = {}


def _kept(make: Callable[..., Any], first: Tensor, second: Tensor, *how: str) -> Any:
    """Return `make(first, second, *how)`, kept for as long as the first tensor lives and neither has changed."""
    if first.is_inference() or second.is_inference():  # from a compiled graph
        return make(first, second, *how)
    now = (first.data_ptr(), first._version, second.data_ptr(), second._version, *how)
    key = id(first)
    found = _prepared.get(key)
    if found is None or found.made_from != now or found.owner() is not first:
        owner = weakref.ref(first, lambda gone: _prepared.pop(key, None) if _is_of(key, gone) else None)
        found = _prepared[key] = _Prepared(owner, (first.detach(), second.detach()), now, make(first, second, *how))
    return found.made


def _is_of(key: int, owner: weakref.ref[Tensor]) -> bool:
    found = _prepared.get(key)
    return found is not None and found.owner is owner


def _pack(weight: Tensor, scale: Tensor) -> Any:
    check_packed(weight)
    return bitnet_kernels.TernaryMatrix.from_hf(weight.numpy(), scale.detach().float().numpy())


def _pack_adapters(u: Tensor, v: Tensor, dtype: str) -> Any:
    u, v = u.detach(), v.detach()
    if dtype == "float16":
        return LowRank(u.half().numpy(), v.half().numpy())
    (u_codes, u_scale), (v_codes, v_scale) = int8_adapter(u), int8_adapter(v)
    return LowRank(u_codes.numpy(), v_codes.numpy(), u_scale.numpy(), v_scale.numpy())


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse what the kernels, which get addresses, would read or write beyond."""
    if x.ndim == 0 or x.shape[-1] != weight.shape[1] or not x.is_floating_point():
        raise UserError(f"x: floating point [..., {weight.shape[1]}] is wanted, not {x.dtype} {list(x.shape)}")
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != CODES_PER_BYTE * weight.shape[0]):
        raise UserError(f"bias: [{CODES_PER_BYTE * weight.shape[0]}] is wanted, not {list(bias.shape)}")


def _fits_adapters(y: Tensor, x: Tensor, u: Tensor, v: Tensor) -> None:
    if x.dtype != torch.float32 or y.dtype != torch.float32:
        raise UserError(f"x and y: float32 is wanted, not {x.dtype} and {y.dtype}")
    if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[1]:
        raise UserError(f"u and v: [out, rank] and [in, rank] are wanted, not {list(u.shape)} and {list(v.shape)}")
    if x.ndim == 0 or x.shape[-1] != v.shape[0] or y.shape != (*x.shape[:-1], u.shape[0]):
        wanted = f"[..., {v.shape[0]}] and [..., {u.shape[0]}]"
        raise UserError(f"x and y: {wanted} of as many tokens are wanted, not {list(x.shape)} and {list(y.shape)}")


def _forward(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    _fits(x, weight, bias)
    rows = x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()
    y = rows.new_empty((*x.shape[:-1], CODES_PER_BYTE * weight.shape[0]))
    matrix = _kept(_pack, weight, weight_scale)
    matrix.matmul_at(rows.data_ptr(), rows.numel() // weight.shape[1], y.data_ptr())
    if bias is not None:
        y += bias
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    _fits(x, weight, bias)
    return x.new_empty((*x.shape[:-1], CODES_PER_BYTE * weight.shape[0]))


def _corrected(y: Tensor, x: Tensor, u: Tensor, v: Tensor, dtype: str) -> Tensor:
    _fits_adapters(y, x, u, v)
    rows, out = x.contiguous(), y.clone(memory_format=torch.contiguous_format)
    adapters = _kept(_pack_adapters, u, v, dtype)
    adapters.add_at(rows.data_ptr(), rows.numel() // v.shape[0], out.data_ptr())
    return out


def _fake_corrected(y: Tensor, x: Tensor, u: Tensor, v: Tensor, dtype: str) -> Tensor:
    _fits_adapters(y, x, u, v)
    return y.new_empty(y.shape)


def _no_gradient(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
    raise UserError("low_rank_corrected has no gradient: train adapters with bitnet_arch.lrc.adapters.correction")


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    weight, scale = ctx.saved_tensors
    matrix = torch.cat(code_planes(weight)) * expand_scale(scale, weight.shape[1])
    return gradient @ matrix.to(gradient.dtype), None, None, None


_library = torch.library.Library("bitnet", "DEF")
# Defined as below rather than by `torch.library.custom_op`, whose calls cost twice as much as a small product.
_library.define(
    "ternary_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.impl("ternary_linear", _forward, "CPU")
torch.library.register_fake("bitnet::ternary_linear", _fake, lib=_library)
torch.library.register_autograd("bitnet::ternary_linear", _backward, setup_context=_setup_context, lib=_library)
_library.define(
    "low_rank_corrected(Tensor y, Tensor x, Tensor u, Tensor v, str dtype) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.impl("low_rank_corrected", _corrected, "CPU")
torch.library.register_fake("bitnet::low_rank_corrected", _fake_corrected, lib=_library)
torch.library.register_autograd("bitnet::low_rank_corrected", _no_gradient, lib=_library)
_operator = torch.ops.bitnet.ternary_linear.default


@register_flop_formula(torch.ops.bitnet.ternary_linear)
def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x_shape.numel() * CODES_PER_BYTE * weight_shape[0]
