"""How large each objective's gradient is."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.objectives.manager import Objectives
from wrinklefree.views import Batch


def gradient_norm(
    objectives: Objectives,
    model: PreTrainedModel,
    parts: Sequence[Batch],
    name: str,
    coefficient: Tensor,
    reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> float:
    """Return the norm of one objective's gradient in all trained parameters; no parameter's `grad` is touched.

    It takes a forward and a backward pass over the parts, and the memory of one gradient.

    Args:
        objectives: the manager.
        model: the student.
        parts: this process's micro-batches of a step.
        name: which objective.
        coefficient: what its sum is multiplied by: 1 / its count over the whole step for the gradient of its mean.
        reduce: sums a gradient over processes; called once for every trained parameter, in their order.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums: list[Tensor | None] = [None] * len(parameters)
    for part in parts:
        total = objectives(model, part, {name: coefficient}).total
        for i, gradient in enumerate(torch.autograd.grad(total, parameters, allow_unused=True)):
            before = sums[i]
            sums[i] = gradient if before is None else before if gradient is None else before.add_(gradient)
    # Zeros where there is no gradient: another process may have one, and all must take part in the same sums.
    whole = (torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, sums, strict=True))
    return float(torch.stack([reduce(gradient).float().square().sum() for gradient in whole]).sum().sqrt())
