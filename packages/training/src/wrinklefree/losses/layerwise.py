"""How far a layer's hidden states are from a teacher's, token by token, and how layers are weighed."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Weighing = Literal["uniform", "linear", "last"]


def normalised_mse(student: Tensor, teacher: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Return |s - t|^2 / (|t|^2 + epsilon) of each row, float32 `[N]`; blind to the states' scale, not to the student's own.

    Args:
        student: `[N, d]`.
        teacher: `[N, d]`.
        epsilon: keeps rows of nothing finite.
    """
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().sum(-1) / (teacher.square().sum(-1) + epsilon)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cos(s, t) of each row, float32 `[N]`; blind to the norm of either."""
    return 1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


ROW_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"nmse": normalised_mse, "cosine": cosine_distance}
"""Distances of rows `[N, d]`; "relation" is `wrinklefree.losses.relations.relation_divergence` of whole sequences."""


def layer_weights(kind: Weighing, layers: int, last: int = 1) -> list[float]:
    """Return the weights of layers 0..L-1, summing to 1.

    Args:
        kind: "uniform"; "linear", l + 1 of layer l; "last", equal over the last `last` layers and 0 elsewhere.
        layers: L.
        last: for "last".
    """
    raw = {
        "uniform": [1.0] * layers,
        "linear": [block + 1.0 for block in range(layers)],
        "last": [float(block >= layers - last) for block in range(layers)],
    }[kind]
    return [value / sum(raw) for value in raw]


def masked_sum(rows: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of rows `[N]` where `mask` `[N]` is true; a row that is no number elsewhere does not spoil it."""
    return torch.where(mask, rows, torch.zeros_like(rows)).sum()
