"""Oracles for small models: the exact damped inverse that DataInf approximates, and the Hessian's own influence function."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from data_handler.errors import UserError
from data_handler.influence.datainf import Damping, damping_factor
from data_handler.influence.gradients import Examples, Gradients, PerSampleGradients, math_attention

LARGEST = 8192
"""Largest matrix that is factorised: 0.5 GiB in float64."""


def exact_scores(train: Gradients, targets: Tensor, damping: Damping = "spectral") -> Tensor:
    """Return Σ_l ⟨g_i, (1/n Σ_j g_j g_jᵀ + λ_l I)⁻¹ v⟩ by Cholesky factorisation in float64.

    The factorised matrix is d x d, or n x n where that is smaller (Woodbury's identity, exact too). Positive = helps.

    Args:
        train: gradients of n examples.
        targets: mean gradient of each target, float32 [t, d].
        damping: λ, as in `datainf_scores`, so that both can be compared at the same one.

    Returns:
        float32 [n, t].

    Raises:
        UserError: if both matrices are larger than `LARGEST`.
    """
    scores = torch.zeros(len(train.values), len(targets), dtype=torch.float64)
    for layer in train.layers:
        part = slice(layer.start, layer.stop)
        g, v = train.values[:, part].double(), targets[:, part].double()
        count, size = g.shape
        if min(count, size) > LARGEST:
            raise UserError(
                f"the exact inverse of {layer.name} needs a matrix of {min(count, size)} rows and {LARGEST} is the most: "
                "use method=datainf, or fewer examples or layers"
            )
        damped = damping_factor(damping, layer) * float(g.square().sum(1).mean())
        if damped == 0:
            continue
        if size <= count:
            curvature = g.T @ g / count + damped * torch.eye(size, dtype=g.dtype)
            scores += g @ torch.cholesky_solve(v.T, torch.linalg.cholesky(curvature))
        else:
            # (λI + GᵀG/n)⁻¹ = (I - Gᵀ(nλI + GGᵀ)⁻¹G) / λ, and G times that is n(nλI + GGᵀ)⁻¹G.
            kernel = g @ g.T + count * damped * torch.eye(count, dtype=g.dtype)
            scores += count * torch.cholesky_solve(g @ v.T, torch.linalg.cholesky(kernel))
    return scores.float()


def hessian_scores(
    source: PerSampleGradients,
    examples: Examples,
    train: Gradients,
    targets: Tensor,
    *,
    damping: float = 1e-3,
    decay: float = 0.0,
    tolerance: float = 1e-6,
    iterations: int = 1000,
) -> Tensor:
    """Return ⟨g_i, (H + (decay + damping) I)⁻¹ v⟩, H the Hessian of the mean training loss (Koh and Liang, arXiv 1703.04730).

    Solved by conjugate gradients on Hessian-vector products, so that no matrix exists. For a convex loss at its minimum with
    `decay` the strength of its L2 penalty, it is the derivative of the target's loss when an example is up-weighted; positive =
    helps. A ternary model's Hessian is that of its straight-through surrogate and means little.

    Args:
        source: the model, at its minimum.
        examples: the n training examples, all in one chunk.
        train: their gradients, not projected.
        targets: mean gradient of each target, float32 [t, d].
        damping: added to the diagonal, absolute.
        decay: λ of a penalty λ/2 ‖θ‖² in the training loss, absolute.
        tolerance: relative residual to stop at.
        iterations: the most that are made.

    Returns:
        float32 [n, t].

    Raises:
        UserError: if the gradients are projected, the matrix is not positive definite, or the iterations do not suffice.
    """
    if train.values.shape[1] != sum(source.sizes):
        raise UserError("a Hessian needs gradients that are not projected: set projection to none")
    shapes = [tensor.shape for tensor in source.selected.values()]

    def unflatten(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split(list(source.sizes))
        return {name: part.view(shape) for name, part, shape in zip(source.names, parts, shapes, strict=True)}

    def mean_loss(selected: dict[str, Tensor]) -> Tensor:
        return vmap(source.loss, in_dims=(None, 0))(selected, dict(examples)).mean()

    def product(flat: Tensor) -> Tensor:
        tangent = jvp(grad(mean_loss), (source.selected,), (unflatten(flat),))[1]
        return torch.cat([tangent[name].flatten() for name in source.names]) + (damping + decay) * flat

    with math_attention(), torch.no_grad():
        solved = torch.stack([conjugate_gradient(product, v, tolerance, iterations) for v in targets])
    return train.times(solved)


def conjugate_gradient(product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float, iterations: int) -> Tensor:
    """Solve A x = right for a symmetric positive definite A, given as `product`.

    Raises:
        UserError: if A is not positive definite, or the residual is still too large after all iterations.
    """
    x, residual = torch.zeros_like(right), right.clone()
    direction, squared = residual.clone(), residual.dot(residual)
    goal = tolerance**2 * float(squared)
    for _ in range(iterations):
        if float(squared) <= goal:
            return x
        image = product(direction)
        curvature = direction.dot(image)
        if curvature <= 0:
            raise UserError("the damped Hessian is not positive definite: raise the damping")
        step = squared / curvature
        x, residual = x + step * direction, residual - step * image
        previous, squared = squared, residual.dot(residual)
        direction = residual + squared / previous * direction
    if float(squared) <= goal:
        return x
    raise UserError(f"the Hessian's system is not solved after {iterations} iterations: raise the damping or the iterations")
