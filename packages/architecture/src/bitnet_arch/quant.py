"""BitNet b1.58 quantisers as pure functions.

Formulas: "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, 2024), figure 3. The order of operations is the
one in `transformers.integrations.bitnet` (multiply by the reciprocal of the scale, then round half to even), so that codes
agree with stock models bit for bit.

Statistics are computed in float32 whatever the input's dtype.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5
"""Lower clamp of both scales, as in the reference code."""

ACTIVATION_LEVELS = 127
"""Largest magnitude of a symmetric 8-bit code."""


Granularity = Literal["tensor", "row", "group128"]
"""How many weights share a scale: the whole matrix, one output row, or 128 neighbours in a row (Bonsai)."""

GROUP = 128

PIECE, LARGE = 1 << 18, 1 << 21
"""Weights that are quantised at once on the CPU, as many as its caches hold through all the steps, and from how many on."""


def absmean_scale(weight: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """Return the scale beta = max(mean |W|, 1e-5) of each group of weights that shares one.

    Args:
        weight: any shape for "tensor", else `[out, in]`; floating point.
        granularity: "tensor", "row" or "group128" (the last group of a row may be shorter).

    Returns:
        float32, 0-dim, `[out, 1]` or `[out, ceil(in / 128)]`; it multiplies codes to dequantise, see `expand_scale`.
    """
    magnitude = weight.float().abs()
    if granularity == "tensor":
        return magnitude.mean().clamp(min=EPS)
    if granularity == "row":
        return magnitude.mean(dim=1, keepdim=True).clamp(min=EPS)
    rows, columns = weight.shape
    groups = -(-columns // GROUP)
    sums = F.pad(magnitude, (0, groups * GROUP - columns)).view(rows, groups, GROUP).sum(dim=2)
    sizes = torch.full((groups,), GROUP, device=weight.device)
    sizes[-1] = columns - (groups - 1) * GROUP
    return (sums / sizes).clamp(min=EPS)


def expand_scale(scale: Tensor, columns: int) -> Tensor:
    """Return a scale of `absmean_scale` in a shape that broadcasts against its matrix of that many columns."""
    if scale.ndim < 2 or scale.shape[1] == 1:
        return scale
    return scale.repeat_interleave(GROUP, dim=1)[:, :columns]


def ternary_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """Return T = clip(round(W / scale), -1, 1) as int8, rounding half to even."""
    return _ternary(weight, scale).to(torch.int8)


def quantize_weight(weight: Tensor, granularity: Granularity = "tensor") -> tuple[Tensor, Tensor]:
    """Quantise a weight matrix to ternary codes.

    Args:
        weight: as in `absmean_scale`.
        granularity: how many weights share a scale.

    Returns:
        `(codes, scale)`: int8 of the same shape in {-1, 0, 1} and the scale; the weight is about
        `codes * expand_scale(scale, in)`.
    """
    scale = absmean_scale(weight, granularity)
    return ternary_codes(weight, scale), scale


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise activations to 8 bits, one scale a token (absmax over the last dimension).

    Args:
        x: `[..., features]`, floating point.

    Returns:
        `(codes, scale)`: int8 `[..., features]` in [-127, 127] and float32 `[..., 1]`; x is about `codes * scale`.
    """
    inverse = _activation_inverse_scale(x)
    return _activation_codes(x, inverse).to(torch.int8), inverse.reciprocal()


@torch.no_grad()
def ternary_weight(weight: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """Return `codes * scale` in the weight's dtype and shape, without a gradient.

    Large float32 parameters on the CPU are quantised piece by piece in one buffer: the same bits in less time.
    """
    # By exact type: what torch.func and sharding put in a parameter's place knows no `out=`.
    by_pieces = type(weight) is torch.nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"
    if by_pieces and weight.ndim == 2 and weight.numel() >= LARGE and not torch.compiler.is_compiling():
        return _ternary_weight_by_pieces(weight, granularity)
    scale = absmean_scale(weight, granularity)
    return _ternary(weight, scale).mul_(expand_scale(scale, weight.shape[-1])).to(weight.dtype)


def _ternary_weight_by_pieces(weight: Tensor, granularity: Granularity) -> Tensor:
    result = torch.empty_like(weight)
    # The first as `absmean_scale` computes it, without another matrix.
    whole = granularity == "tensor"
    scale = torch.abs(weight, out=result).mean().clamp(min=EPS) if whole else absmean_scale(weight, granularity)
    step = max(1, PIECE // weight.shape[1])
    scales = [scale] * -(-len(weight) // step) if whole else scale.split(step)
    for rows, out, of_rows in zip(weight.split(step), result.split(step), scales, strict=True):
        torch.mul(rows, expand_scale(of_rows.reciprocal(), rows.shape[1]), out=out)
        out.round_().clamp_(-1, 1).mul_(expand_scale(of_rows, rows.shape[1]))
    return result


def fake_quant_weight(weight: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """Return `codes * scale` in the weight's dtype, with the straight-through gradient (identity, no clipping mask)."""
    return _straight_through(weight, ternary_weight(weight, granularity))


def fake_quant_activation(x: Tensor) -> Tensor:
    """Return the 8-bit rounding of `x` (`[..., features]`) in its dtype, with the straight-through gradient."""
    with torch.no_grad():
        inverse = _activation_inverse_scale(x)
        quantized = _activation_codes(x, inverse).div_(inverse).to(x.dtype)
    return _straight_through(x, quantized)


class _StraightThrough(torch.autograd.Function):
    """Its value is `quantized` bit for bit, its gradient goes to `x` unchanged.

    The usual `x + (quantized - x).detach()` rounds twice, so that what is trained is not quite what is packed, and takes two
    more passes over memory.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _ForwardStraightThrough(_StraightThrough):
    """The same with a forward-mode derivative, which torch.compile cannot trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


def _straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    # Also where nothing requires a gradient: under `torch.func.jvp` tangents flow all the same.
    function = _StraightThrough if torch.compiler.is_compiling() else _ForwardStraightThrough
    return function.apply(x, quantized)  # type: ignore[no-untyped-call,no-any-return]


def _ternary(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.float() * expand_scale(scale.reciprocal(), weight.shape[-1])).round_().clamp_(-1, 1)


def _activation_inverse_scale(x: Tensor) -> Tensor:
    return ACTIVATION_LEVELS / x.float().abs().amax(dim=-1, keepdim=True).clamp(min=EPS)


def _activation_codes(x: Tensor, inverse_scale: Tensor) -> Tensor:
    return (x.float() * inverse_scale).round_().clamp(-ACTIVATION_LEVELS - 1, ACTIVATION_LEVELS)
