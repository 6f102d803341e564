"""Ternary quantisers that look at a matrix, and at the covariance of what it multiplies, but at no gradient.

Each solves `min ‖(W - Ŵ) H^½‖²` over ternary matrices with a scale for each group of weights, the better the more it looks at:

* `absmean` does not look: BitNet's own rule;
* `least_squares` finds the best codes and scales for H = I, and with an H the best scales for these codes;
* `gptq` rounds column by column and lets later columns make up for the error of earlier ones (Frantar et al., arXiv 2210.17323),
  then fits the scales to its codes.

Relative squared error on Gaussian weights with H = I: 0.263, 0.190, 0.190.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_arch.errors import UserError
from bitnet_arch.quant import EPS, GROUP, Granularity, absmean_scale, expand_scale, quantize_weight

Method = Literal["absmean", "least_squares", "gptq", "gptq_act_order"]
"""A quantiser's name; see `QUANTIZERS`."""

COLUMNS = 128
"""Columns that GPTQ finishes before it passes their error on to all that follow: one large product instead of many small ones."""


def absmean(weight: Tensor, hessian: Tensor | None, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """BitNet b1.58's rule, `bitnet_arch.quant.quantize_weight`; the Hessian is not looked at. Contract: see `least_squares`."""
    return quantize_weight(weight, granularity)


def least_squares(weight: Tensor, hessian: Tensor | None, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Quantise with the codes that are exactly best for H = I, and the best scales for them under H.

    For a group with magnitudes |w| sorted downwards, keeping the m largest leaves an error of ‖w‖² - (sum of these m)² / m: the
    best m is found by looking at all of them.

    Args:
        weight: `[out, in]`, floating point.
        hessian: `[in, in]`, the covariance of the layer's (quantised) inputs; None for the identity.
        granularity: how many weights share a scale.

    Returns:
        `(codes, scale)`: int8 `[out, in]` in {-1, 0, 1}, and float32 in a shape of `bitnet_arch.quant.absmean_scale`.
    """
    grouped = _grouped(weight.double().abs(), granularity)
    count = torch.arange(1, grouped.shape[-1] + 1, dtype=torch.float64, device=weight.device)
    sums = grouped.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    best = (sums.square() / count).argmax(dim=-1, keepdim=True)
    found = (sums.gather(-1, best) / (best + 1)).clamp(min=EPS)
    scale = found.reshape(()) if granularity == "tensor" else found.reshape(len(weight), -1)
    codes = nearest_codes(weight, scale)
    return codes, scale.float() if hessian is None else fit_scale(weight, codes, hessian, scale)


def gptq(
    weight: Tensor, hessian: Tensor | None, granularity: Granularity, *, activation_order: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantise column by column with error feedback: GPTQ with three levels.

    Deviations from the paper: the grid is `least_squares`' for the whole matrix and is set before the first column, also where
    128 columns share a scale ("static groups"); afterwards the scales are fitted to the codes under H. Damping is the
    caller's, see `bitnet_arch.lrc.covariance.Covariances.regularized`.

    Args:
        weight: as in `least_squares`.
        hessian: as in `least_squares`, positive definite; with None there is nothing to feed back, and this is `least_squares`.
        granularity: as in `least_squares`.
        activation_order: start with the columns whose inputs are largest.

    Returns:
        As `least_squares`.

    Raises:
        UserError: if the Hessian is not positive definite.
    """
    codes, scale = least_squares(weight, None, granularity)
    if hessian is None:
        return codes, scale
    hessian = hessian.double()
    order = torch.arange(len(hessian), device=weight.device)
    if activation_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor, failed = torch.linalg.cholesky_ex(hessian[order][:, order] if activation_order else hessian)
    if failed:
        raise UserError("the covariance of a layer's inputs is not positive definite: calibrate on more tokens or raise epsilon")
    factor = torch.cholesky_inverse(factor)
    feedback = torch.linalg.cholesky(factor, upper=True)
    del factor
    # Transposed, so that a column of the matrix is contiguous.
    columns = weight.double().T[order].contiguous()
    grid = expand_scale(scale.double(), weight.shape[1]).expand_as(weight).T[order].contiguous()
    chosen = torch.empty_like(columns)
    for start in range(0, len(columns), COLUMNS):
        stop = min(start + COLUMNS, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            chosen[i] = (columns[i] / grid[i]).round().clamp(-1, 1)
            errors[i - start] = (columns[i] - chosen[i] * grid[i]) / feedback[i, i]
            columns[i + 1 : stop] -= torch.outer(feedback[i, i + 1 : stop], errors[i - start])
        columns[stop:] -= feedback[start:stop, stop:].T @ errors
    codes = torch.empty_like(codes)
    codes[:, order] = chosen.T.to(torch.int8)
    return codes, fit_scale(weight, codes, hessian, scale)


def _gptq_act_order(weight: Tensor, hessian: Tensor | None, granularity: Granularity) -> tuple[Tensor, Tensor]:
    return gptq(weight, hessian, granularity, activation_order=True)


Quantizer = Callable[[Tensor, Tensor | None, Granularity], tuple[Tensor, Tensor]]

QUANTIZERS: dict[Method, Quantizer] = {
    "absmean": absmean,
    "least_squares": least_squares,
    "gptq": gptq,
    "gptq_act_order": _gptq_act_order,
}
"""Maps a method to `(weight, hessian, granularity) -> (codes, scale)`."""


def quantizer(method: str) -> Quantizer:
    """Return a method's quantiser.

    Raises:
        UserError: if there is no such method.
    """
    if method not in get_args(Method):
        raise UserError(f"unknown quantiser {method!r}: choose {', '.join(get_args(Method))}")
    return QUANTIZERS[method]  # type: ignore[index]


def nearest_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the int8 codes nearest to a matrix on the grid of a scale."""
    return (weight.double() / expand_scale(scale.double(), weight.shape[1])).round().clamp(-1, 1).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Return `codes · scale`, float64 `[out, in]`."""
    return codes.double() * expand_scale(scale.double(), codes.shape[1])


def fit_scale(weight: Tensor, codes: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    """Return the scales that minimise `‖(W - Ŵ) H^½‖²` for given codes.

    Rows are independent; within a row, the scales of its groups of 128 solve one small linear system.

    Args:
        weight: `[out, in]`.
        codes: int8 `[out, in]`.
        hessian: `[in, in]`, positive definite.
        scale: what a row keeps where its codes decide nothing (a group of zeros) or a best scale would not be positive; its shape
            says how many weights share a scale.

    Returns:
        float32, in the shape of `scale`.
    """
    hessian, signs = hessian.double(), codes.double()
    wanted = weight.double() @ hessian
    if scale.ndim < 2 or scale.shape[1] == 1:
        over, under = ((m * signs).sum(dim=1, keepdim=True) for m in (wanted, signs @ hessian))
        if scale.ndim < 2:
            over, under = over.sum(), under.sum()
        fitted = over / under.clamp(min=torch.finfo(torch.float64).tiny)
        usable = fitted > EPS
    else:
        groups = scale.shape[1]
        gram = torch.empty(len(codes), groups, groups, dtype=torch.float64, device=weight.device)
        for g, part in enumerate(torch.arange(codes.shape[1], device=weight.device).split(GROUP)):
            gram[:, :, g] = _group_sums((signs[:, part] @ hessian[part]) * signs)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal[diagonal <= 0] = 1.0  # a group of zeros: its row and column are zero, too
        fitted = torch.linalg.solve(gram, _group_sums(wanted * signs).unsqueeze(-1)).squeeze(-1)
        # A row is solved as a whole: one scale that cannot be used takes the others back, too.
        usable = (fitted > EPS).all(dim=1, keepdim=True)
    return torch.where(usable, fitted, scale.double()).float()


def master_weight(codes: Tensor, scale: Tensor, granularity: Granularity, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the float matrix whose absmean quantisation has these codes and this scale: how a `BitLinear` can hold them.

    Absmean of `codes · scale` would be the scale times the share of nonzero codes; divided by that share, it is the scale, up to
    float32 rounding.

    Args:
        codes: int8 `[out, in]`.
        scale: its scale.
        granularity: the layer's.
        dtype: of the result; one too coarse for the scale moves the scale, never a code.
    """
    share = absmean_scale(codes.float(), granularity)
    columns = codes.shape[1]
    return (codes.float() * expand_scale(scale, columns) / expand_scale(share, columns)).to(dtype)


def _grouped(magnitude: Tensor, granularity: Granularity) -> Tensor:
    """Return `[groups, weights]`; a last group of 128 is filled up with zeros, which change neither sums nor the best count."""
    if granularity == "tensor":
        return magnitude.reshape(1, -1)
    if granularity == "row":
        return magnitude
    return F.pad(magnitude, (0, -magnitude.shape[1] % GROUP)).reshape(-1, GROUP)


def _group_sums(values: Tensor) -> Tensor:
    """Sum `[rows, columns]` over groups of 128 columns."""
    return torch.stack([part.sum(dim=1) for part in values.split(GROUP, dim=1)], dim=1)
