"""Sums of many pieces in the memory of one: each piece's gradient is taken at once, and its graph is gone before the next."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE_ELEMENTS = 1 << 23
"""Elements of the largest tensor of a piece (32 MiB in float32); a loss and its gradient hold about ten of that size."""

Piece = Callable[..., Tensor]


def piece_rows(rows: int, width: int, elements: int = PIECE_ELEMENTS) -> list[slice]:
    """Cut `rows` rows of `width` elements into slices of at most `elements` elements, at least one row each."""
    step = max(1, elements // max(1, width))
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def sum_of_pieces(
    piece: Piece, slices: Sequence[slice], weights: Tensor, *inputs: Tensor, filled: Mapping[int, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return `sum over pieces of weights @ piece(slice, *inputs)`, and the pieces' values side by side.

    The gradients in the inputs are computed in the forward pass, piece by piece, and kept (as large as the inputs) until the
    backward pass, which only scales them: no piece is computed twice, and nothing of a piece outlives it. They are gradients of
    first order only.

    Args:
        piece: called with a slice and the inputs; returns float `[K, slice]`, K losses of each row of the slice.
        slices: cut the rows 0..N.
        weights: float `[K]`, constants; a loss of weight 0 is computed and contributes nothing.
        inputs: what gradients flow to, as far as they require any.
        filled: input's index to a tensor of zeros into which the backward of `piece` itself adds that input's gradient.

    Returns:
        The weighted sum, a scalar that can be differentiated; and all values, `[K, N]`, which cannot.
    """
    total, values = _Sum.apply(piece, slices, filled or {}, weights, *inputs)
    return total, values


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, piece: Piece, slices: Sequence[slice], filled: Mapping[int, Tensor], weights: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        # A parameter stays what it is: the piece may reach it through its module.
        leaves = [tensor if tensor.is_leaf else tensor.detach().requires_grad_(i in wanted) for i, tensor in enumerate(inputs)]
        gradients: list[Tensor | None] = [filled.get(i) for i in range(len(inputs))]
        asked = [i for i in wanted if i not in filled]
        values = []
        for part in slices:
            with torch.set_grad_enabled(bool(wanted)):
                value = piece(part, *leaves)
                weighted = weights.to(value.dtype) @ value.sum(1)
            values.append(value.detach())
            if filled and not asked:
                weighted.backward()  # type: ignore[no-untyped-call]
            elif asked and weighted.requires_grad:
                found = torch.autograd.grad(weighted, [leaves[i] for i in asked], allow_unused=True)
                for i, gradient in zip(asked, found, strict=True):
                    before = gradients[i]
                    gradients[i] = gradient if before is None else before if gradient is None else before.add_(gradient)
                del found
            del value, weighted
        all_values = torch.cat(values, dim=1) if values else weights.new_zeros(len(weights), 0)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(all_values)
        return weights.to(all_values.dtype) @ all_values.sum(1), all_values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of a sum of pieces were used up by an earlier backward pass")
        # In place: they are as large as the head's weight, and nobody else holds them.
        return (None, None, None, None, *(None if g is None else g.mul_(outer.to(g.dtype)) for g in gradients))
