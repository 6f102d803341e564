"""The arithmetic of low-rank adapters: their rank, how they are stored, and what they add to a layer's output."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_arch.errors import UserError
from bitnet_arch.quant import _straight_through

AdapterDtype = Literal["float16", "int8"]
"""What adapters are stored in: two bytes a number, or one byte and a float32 scale a column."""

LEVELS = 127
"""Largest magnitude of an int8 adapter's codes."""

SMALLEST = 1e-30
"""Lower clamp of a column's largest magnitude."""


def layer_rank(rank: int | float, in_features: int, out_features: int, name: str = "a layer") -> int:
    """Return a layer's rank: a whole number is the rank itself, a number below 1 a share of the layer's smaller side.

    Args:
        rank: as in `bitnet_arch.modeling.TernaryForm`.
        in_features: the layer's inputs.
        out_features: the layer's outputs.
        name: what an error calls the layer.

    Raises:
        UserError: for a whole number above the layer's smaller side, beyond which a rank adds nothing but bits.
    """
    smaller = min(in_features, out_features)
    if isinstance(rank, float):
        return max(1, round(rank * smaller))
    if rank > smaller:
        raise UserError(
            f"a rank of {rank} is above what {name} can have, a matrix of {out_features} x {in_features}: choose at most "
            f"{smaller}, or a share of each layer's smaller side as a number below 1"
        )
    return rank


def check_ranks(rank: int | float, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a rank that is above the smallest of the matrices that are to be corrected, naming that.

    Args:
        rank: as in `bitnet_arch.modeling.TernaryForm`.
        shapes: layer name to `(out, in)`.

    Raises:
        UserError: for a whole number above the smallest side of any of them.
    """
    name, (rows, columns) = min(shapes.items(), key=lambda item: min(item[1]))
    layer_rank(rank, columns, rows, name)


def check_rank(rank: int | float) -> None:
    """Refuse what is neither a rank of at least 1 nor a share.

    Raises:
        UserError: for such a value.
    """
    good = not isinstance(rank, bool) and ((isinstance(rank, int) and rank >= 1) or (isinstance(rank, float) and 0 < rank < 1))
    if not good:
        raise UserError(f"lrc_rank must be a whole number of at least 1, or a share between 0 and 1, not {rank!r}")


def adapter_bits(rank: int, in_features: int, out_features: int, dtype: AdapterDtype) -> float:
    """Return what a layer's adapters cost, in bits for each weight of the layer."""
    numbers = rank * (in_features + out_features)
    bits = 16 * numbers if dtype == "float16" else 8 * numbers + 2 * 32 * rank
    return bits / (in_features * out_features)


def int8_adapter(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round an adapter to int8, one absmax scale a column.

    Args:
        values: `[features, rank]`, floating point.

    Returns:
        `(codes, scale)`: int8 of the same shape and float32 `[rank]`, which multiplies. Rounding `codes · scale` again gives the
        same codes and scale, bit for bit: the scale keeps 16 bits, so that 127 times it is a float32, too.
    """
    mantissa, exponent = torch.frexp(values.float().abs().amax(dim=0).clamp(min=SMALLEST) / LEVELS)
    scale = torch.ldexp((mantissa * 2**16).ceil() / 2**16, exponent)
    return (values.float() / scale).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


def as_stored(values: Tensor, dtype: AdapterDtype) -> Tensor:
    """Return an adapter as it is after storage, in its own dtype; the gradient goes through unchanged (straight-through)."""
    with torch.no_grad():
        if dtype == "float16":
            stored = values.half().to(values.dtype)
        else:
            codes, scale = int8_adapter(values)
            stored = (codes * scale).to(values.dtype)
    return _straight_through(values, stored)


def correction(x: Tensor, u: Tensor, v: Tensor, dtype: AdapterDtype) -> Tensor:
    """Return `U Vᵀ x` with adapters as they are after storage.

    Args:
        x: `[..., in]`, what the layer's activation quantiser would round next.
        u: `[out, rank]`.
        v: `[in, rank]`.
        dtype: what adapters are stored in.

    Returns:
        `[..., out]`, in x's dtype outside autocast.
    """
    return F.linear(F.linear(x, as_stored(v, dtype).to(x.dtype).T), as_stored(u, dtype).to(x.dtype))


def random_adapters(
    rank: int, in_features: int, out_features: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return adapters that correct nothing yet and can be trained: U = 0 and V ~ N(0, 1 / in)."""
    u = torch.zeros(out_features, rank, device=device, dtype=dtype)
    v = torch.randn(in_features, rank, device=device, dtype=dtype) * in_features**-0.5
    return u, v


def check_adapters(u: Tensor, v: Tensor, in_features: int, out_features: int) -> None:
    """Refuse adapters that do not fit a layer, or that no training could move.

    Raises:
        UserError: for other shapes, values that are not finite, or U = V = 0: each one's gradient is a product with the other.
    """
    if u.ndim != 2 or v.ndim != 2 or u.shape != (out_features, v.shape[1]) or len(v) != in_features:
        found = f"{list(u.shape)} and {list(v.shape)}"
        raise UserError(f"adapters of {found} do not fit a layer of {out_features} x {in_features}: U is [out, rank], V [in, rank]")
    if u.is_meta or v.is_meta:
        return
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise UserError("an adapter holds values that are not finite: solve it again with a larger epsilon")
    if not u.any() and not v.any():
        raise UserError("U and V are both zero, and then neither gets a gradient: start from U = 0 and a random V")
