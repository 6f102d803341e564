"""DataInf: influence with a closed form for the damped inverse (Kwon et al., arXiv 2310.00902, equation 5)."""

from typing import Literal

import torch
from torch import Tensor

from data_handler.errors import UserError
from data_handler.influence.gradients import Gradients, Layer

Damping = Literal["reference", "spectral"] | float
"""λ_l as a multiple of E‖g_l‖², the sum of the curvature's eigenvalues:

* "reference": 0.1 / d_l, that is a tenth of the mean *element* of g². The authors' code. With many parameters it lies far below
the
  curvature's large eigenvalues, where the closed form is least accurate.
* "spectral": 0.1. It is as large as those eigenvalues, and the closed form is close to the exact inverse.
* a number: itself. From about 1 on the inverse is nearly a multiple of the identity, and the scores rank as TracIn's.
"""

SHARE = 0.1


def damping_factor(damping: Damping, layer: Layer) -> float:
    """Return λ_l / E‖g_l‖².

    Raises:
        UserError: for another word, or a number that is not above 0.
    """
    if damping == "reference":
        return SHARE / layer.size
    if damping == "spectral":
        return SHARE
    if isinstance(damping, str) or not 0 < damping < float("inf"):
        raise UserError(f"damping must be reference, spectral or a number above 0, not {damping!r}")
    return damping


def datainf_scores(train: Gradients, targets: Tensor, damping: Damping = "spectral") -> Tensor:
    """Return Σ_l ⟨h_l, g_i⟩, h_l = 1 / (n λ_l) Σ_j [v - ⟨v, g_j⟩ / (λ_l + ‖g_j‖²) g_j], layer by layer.

    It swaps the mean and the inverse in (mean g gᵀ + λI)⁻¹ v and inverts every rank-one term by Sherman-Morrison: O(n·d). The
    sign is the opposite of the paper's: positive = helps.

    Args:
        train: gradients of n examples; `Gradients.joint` makes all parameters one layer. Where they are projected, E‖g‖² is that
            of the projections, which keep it, and d_l stays the number of parameters.
        targets: mean gradient of each target, float32 [t, d].
        damping: λ, see `Damping`.

    Returns:
        float32 [n, t]. A layer whose gradients are all zero adds nothing.
    """
    norms = train.squared_norms()
    count = len(norms)
    products = layer_products(train, targets)
    corrected = torch.zeros_like(targets)
    damped = [damping_factor(damping, layer) * float(norms[:, i].mean()) for i, layer in enumerate(train.layers)]
    row = 0
    for block in train.blocks():
        rows, row = slice(row, row + len(block)), row + len(block)
        for i, layer in enumerate(train.layers):
            weights = products[i][rows] / (damped[i] + norms[rows, i : i + 1]).clamp(min=torch.finfo(norms.dtype).tiny)
            corrected[:, layer.start : layer.stop] += weights.T @ block[:, layer.start : layer.stop]
    directions = torch.zeros_like(targets)
    for i, layer in enumerate(train.layers):
        if damped[i] > 0:
            part = slice(layer.start, layer.stop)
            directions[:, part] = (targets[:, part] - corrected[:, part] / count) / damped[i]
    return train.times(directions)


def layer_products(train: Gradients, targets: Tensor) -> list[Tensor]:
    """Return ⟨g_i, v_t⟩ within each layer: a list of [n, t]."""
    parts: list[list[Tensor]] = [[] for _ in train.layers]
    for block in train.blocks():
        for found, layer in zip(parts, train.layers, strict=True):
            found.append(block[:, layer.start : layer.stop] @ targets[:, layer.start : layer.stop].T)
    return [torch.cat(found) for found in parts]
