"""The solvers of LRC as pure functions of a weight and the covariances of its inputs (Scetbon & Hensman, arXiv 2412.07902).

With X a layer's inputs, `[in, tokens]`, and Y = Qa(X) what is left of them after rounding, they look for

    min over ternary Ŵ, U `[out, k]`, V `[in, k]` of  ‖W X - Ŵ Y - U Vᵀ X‖²

of which only Sxx = XXᵀ, Sxy = XYᵀ and Syy = YYᵀ need to be known. U always has orthonormal columns. Everything is float64.

Deviation: eigenproblems are solved on the smaller side of a matrix, where the paper's are `[out, out]`; the subspace is the same.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitnet_arch.errors import UserError
from bitnet_arch.lrc.covariance import Covariances
from bitnet_arch.ptq.quantizers import Quantizer, dequantize
from bitnet_arch.quant import Granularity

Decomposition = Literal["exact", "randomized"]
"""How the top of a spectrum is found: from all of it, or from a random sketch (Halko, Martinsson & Tropp, arXiv 0909.4061)."""

Start = Literal["ternary", "relaxed"]
"""What an alternation begins with: Ŵ as the quantised W, or U and V as the best ones for any real Ŵ (the paper)."""

OVERSAMPLING, POWER_ITERATIONS = 10, 4


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a solver found.

    Attributes:
        codes: int8 `[out, in]`.
        scale: float32, in a shape of `bitnet_arch.quant.absmean_scale`.
        u: float64 `[out, k]`.
        v: float64 `[in, k]`.
        errors: the relative error after each step; the solution is the best step's.
    """

    codes: Tensor
    scale: Tensor
    u: Tensor
    v: Tensor
    errors: tuple[float, ...]


def relative_error(weight: Tensor, ternary: Tensor, s: Covariances, u: Tensor | None = None, v: Tensor | None = None) -> float:
    """Return `‖W X - Ŵ Y - U Vᵀ X‖² / ‖W X‖²`.

    Args:
        weight: W, `[out, in]`.
        ternary: Ŵ, dequantised, `[out, in]`.
        s: covariances.
        u: U, `[out, k]`; without it there is no correction.
        v: V, `[in, k]`.
    """
    w, t = weight.double(), ternary.double()
    rest = w if u is None or v is None else w - u.double() @ v.double().T
    error = ((rest @ s.sxx) * rest).sum() - 2 * ((rest @ s.sxy) * t).sum() + ((t @ s.syy) * t).sum()
    return float(error / ((w @ s.sxx) * w).sum())


def relaxed_adapters(weight: Tensor, s: Covariances, rank: int, how: Decomposition = "exact") -> tuple[Tensor, Tensor]:
    """Return the best U and V where Ŵ may be any real matrix: `U = top eigenvectors of W S_E Wᵀ`, `V = Wᵀ U`.

    S_E = Sxx - Sxy Syy⁻¹ Syx is what rounding takes from the inputs beyond repair by a linear map.

    Args:
        weight: W, `[out, in]`.
        s: covariances, Syy positive definite.
        rank: k, at most the smaller side of W.
        how: how eigenvectors are found.
    """
    w = weight.double()
    lost = s.sxx - s.sxy @ torch.cholesky_solve(s.sxy.T, _cholesky(s.syy))
    values, vectors = torch.linalg.eigh((lost + lost.T) / 2)
    u = top_left(w @ (vectors * values.clamp(min=0).sqrt()), rank, how)
    return u, w.T @ u


def fit_adapters(weight: Tensor, ternary: Tensor, s: Covariances, rank: int, how: Decomposition = "exact") -> tuple[Tensor, Tensor]:
    """Return the best U and V for a given Ŵ: reduced-rank regression of what Ŵ leaves over.

    With B = W Sxx - Ŵ Syx, U are the top eigenvectors of `B Sxx⁻¹ Bᵀ` and `V = Sxx⁻¹ Bᵀ U`.

    Args:
        weight: W, `[out, in]`.
        ternary: Ŵ, dequantised, `[out, in]`.
        s: covariances, Sxx positive definite.
        rank: k, at most the smaller side of W.
        how: how eigenvectors are found.
    """
    b = weight.double() @ s.sxx - ternary.double() @ s.sxy.T
    factor = _cholesky(s.sxx)
    # With Sxx = LLᵀ, the eigenvectors are the left singular vectors of B L⁻ᵀ.
    u = top_left(torch.linalg.solve_triangular(factor, b.T, upper=False).T, rank, how)
    return u, torch.cholesky_solve(b.T @ u, factor)


def ternary_target(weight: Tensor, s: Covariances, u: Tensor, v: Tensor) -> Tensor:
    """Return the real matrix that Ŵ should be for given U and V: `(W - U Vᵀ) Sxy Syy⁻¹`, to be rounded in the metric of Syy."""
    rest = weight.double() - u @ v.T
    return torch.cholesky_solve((rest @ s.sxy).T, _cholesky(s.syy)).T


def alternate(
    weight: Tensor,
    s: Covariances,
    rank: int,
    quantize: Quantizer,
    granularity: Granularity = "tensor",
    *,
    steps: int = 1,
    start: Start = "relaxed",
    how: Decomposition = "exact",
) -> Solution:
    """Solve for Ŵ, U and V in turn.

    The rounding of a real matrix is not exact for any quantiser, so that a step may raise the error: the best step's is returned.

    Args:
        weight: W, `[out, in]`.
        s: covariances, positive definite, see `Covariances.regularized`.
        rank: k.
        quantize: rounds a matrix in the metric of a covariance, see `bitnet_arch.ptq.quantizers`.
        granularity: how many weights share a scale.
        steps: how often Ŵ is rounded; each time U and V are fitted to it afterwards. At least 1.
        start: what the first rounding starts from.
        how: how eigenvectors are found.
    """
    w = weight.double()
    if start == "relaxed":
        u, v = relaxed_adapters(w, s, rank, how)
    else:
        u, v = w.new_zeros(len(w), rank), w.new_zeros(w.shape[1], rank)
    errors: list[float] = []
    best = None
    for _ in range(steps):
        codes, scale = quantize(ternary_target(w, s, u, v), s.syy, granularity)
        ternary = dequantize(codes, scale)
        u, v = fit_adapters(w, ternary, s, rank, how)
        errors.append(relative_error(w, ternary, s, u, v))
        if errors[-1] == min(errors):
            best = codes, scale, u, v
    assert best is not None
    return Solution(codes=best[0], scale=best[1], u=best[2], v=best[3], errors=tuple(errors))


def top_left(matrix: Tensor, rank: int, how: Decomposition = "exact", seed: int = 0) -> Tensor:
    """Return the leading left singular vectors of a matrix.

    Args:
        matrix: A, float64 `[rows, columns]`.
        rank: how many, at most the smaller side.
        how: "exact" from the eigenvectors of A Aᵀ or Aᵀ A, whichever is smaller; "randomized" from a Gaussian sketch.
        seed: of the sketch.

    Returns:
        `[rows, rank]`, orthonormal, the largest singular value first; a basis of the same space where values are equal.
    """
    rows, columns = matrix.shape
    if how == "randomized" and rank + OVERSAMPLING < min(rows, columns):
        generator = torch.Generator().manual_seed(seed)
        sketch = torch.randn(columns, rank + OVERSAMPLING, dtype=matrix.dtype, generator=generator).to(matrix.device)
        basis: Tensor = torch.linalg.qr(matrix @ sketch).Q
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        return basis @ _eigenvectors(basis.T @ matrix, rank)
    if rows <= columns:
        return _eigenvectors(matrix, rank)
    # Not divided by the singular values, some of which may be zero: the QR keeps leading spaces all the same.
    leading: Tensor = torch.linalg.qr(matrix @ _eigenvectors(matrix.T, rank)).Q
    return leading


def _eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading eigenvectors of A Aᵀ."""
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
    return vectors.flip(-1)[:, :rank]


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise UserError("the covariance of a layer's inputs is not positive definite: calibrate on more tokens or raise epsilon")
    return factor
