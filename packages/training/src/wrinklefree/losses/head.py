"""Losses of the logits that never hold logits of all tokens: a few rows at a time, all losses together."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from wrinklefree.losses.pieces import PIECE_ELEMENTS, piece_rows, sum_of_pieces

RowLoss = Callable[[Tensor, slice], Tensor]
"""Maps float32 logits `[n, V]` of the rows in a slice to a loss each, `[n]`."""


def head_losses(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    losses: Sequence[RowLoss],
    weights: Tensor,
    *,
    vocabulary: int,
    elements: int = PIECE_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of several losses of the logits `head(hidden)`, and each loss of each row.

    Logits exist for one piece of rows at a time, in which the gradients of all losses are taken together: one product by the
    head's weight forward and two backward, as without pieces. The gradient of the head's weight is held once; that of a plain
    linear layer without bias is added to in place.

    Args:
        hidden: float `[N, d]`.
        head: gives logits `[n, V]`; a plain linear layer, a tied embedding's or a `BitLinear`.
        parameters: the head's, for their gradients.
        losses: K of them.
        weights: float `[K]`.
        vocabulary: V.
        elements: of the logits of a piece.

    Returns:
        A scalar and float32 `[K, N]`, see `wrinklefree.losses.pieces.sum_of_pieces`.
    """
    if len(hidden) == 0:
        # Zeros, not no gradient: other processes have rows, and DDP waits for every parameter's.
        total = torch.stack([tensor[:0].sum() for tensor in (hidden, *parameters)]).sum()
        return total, weights.new_zeros(len(losses), 0)

    weight = _plain_weight(head, parameters) if torch.is_grad_enabled() else None
    filled = {} if weight is None else {1: torch.zeros_like(weight)}

    def piece(part: slice, leaf: Tensor, *_: Tensor) -> Tensor:
        logits = head(leaf[part]) if weight is None else _InPlace.apply(leaf[part], weight, filled[1])
        return torch.stack([loss(logits.float(), part) for loss in losses])

    slices = piece_rows(len(hidden), vocabulary, elements)
    return sum_of_pieces(piece, slices, weights, hidden, *parameters, filled=filled)


def _plain_weight(head: object, parameters: Sequence[nn.Parameter]) -> nn.Parameter | None:
    """Return the weight of a head that is nothing but a product by it, in its own precision."""
    module = getattr(head, "plain", head)
    plain = type(module) is nn.Linear and module.bias is None and len(parameters) == 1
    return parameters[0] if plain and not torch.is_autocast_enabled(parameters[0].device.type) else None


class _InPlace(torch.autograd.Function):
    """`F.linear`, whose backward adds the weight's gradient to a tensor: as large as a vocabulary, it is not to be made anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        ctx.gradient.addmm_(outer.T, x)
        return outer @ weight, None, None
