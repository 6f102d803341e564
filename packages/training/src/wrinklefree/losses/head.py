"""Losses of the logits that never hold logits of all tokens: a few rows at a time, all losses together."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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
    head's weight forward and two backward, as without pieces. The gradient of the head's weight is held once.

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
        return hidden.sum() * 0.0, weights.new_zeros(len(losses), 0)

    def piece(part: slice, leaf: Tensor, *_: Tensor) -> Tensor:
        logits = head(leaf[part]).float()
        return torch.stack([loss(logits, part) for loss in losses])

    return sum_of_pieces(piece, piece_rows(len(hidden), vocabulary, elements), weights, hidden, *parameters)
