"""A short training run of the selected layers, for the checkpoints and Adam moments that TracIn and LESS need."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap

from data_handler.errors import UserError
from data_handler.influence.gradients import Examples, PerSampleGradients, math_attention
from data_handler.influence.less import BETA1, BETA2, EPS, AdamMoments
from data_handler.mixing import permutation


@dataclass(frozen=True)
class WarmupState:
    """A checkpoint of the warm-up.

    Attributes:
        parameters: the selected parameters' values.
        moments: Adam's.
        rate: the learning rate that led here.
    """

    parameters: dict[str, Tensor]
    moments: AdamMoments
    rate: float


def adam_warmup(
    source: PerSampleGradients,
    examples: Examples,
    *,
    steps: int,
    checkpoints: int = 1,
    learning_rate: float = 1e-4,
    batch: int = 8,
    micro_batch: int = 8,
    seed: int = 0,
) -> Iterator[WarmupState]:
    """Train the selected layers with Adam and yield `checkpoints` states, evenly spaced, the last after `steps`.

    The model itself stays as it is. LESS warms up on 5% of the data for 4 epochs with LoRA and a linearly decaying rate;
    deviations: the selected layers are trained themselves, and the rate decays linearly to zero over the steps.

    Args:
        source: the model and its selected layers.
        examples: what to train on, in an order that depends on the seed alone; begun again where it ends.
        steps: optimiser steps.
        checkpoints: states to yield.
        learning_rate: at the first step.
        batch: examples a step.
        micro_batch: examples in one forward and backward; changes no result but its rounding.
        seed: of the order.

    Raises:
        UserError: for numbers that do not fit together.
    """
    if not 1 <= checkpoints <= steps:
        raise UserError(f"warm-up checkpoints must be from 1 to its {steps} steps, not {checkpoints}")
    count = len(next(iter(examples.values())))
    values = {name: tensor.clone() for name, tensor in source.selected.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    due = {round(steps * (i + 1) / checkpoints) for i in range(checkpoints)}

    def total(selected: dict[str, Tensor], part: dict[str, Tensor]) -> Tensor:
        return vmap(source.loss, in_dims=(None, 0), randomness="error")(selected, part).sum()

    for step in range(1, steps + 1):
        rate = learning_rate * (1 - (step - 1) / steps)
        rows = torch.tensor([_row(count, (step - 1) * batch + i, seed) for i in range(batch)])
        gradients = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
        with math_attention(), torch.no_grad():
            for chosen in rows.split(micro_batch):
                part = {name: value[chosen].to(source.device) for name, value in examples.items()}
                for name, found in grad(total)(values, part).items():
                    gradients[name] += found / batch
        for name, g in gradients.items():
            first[name].lerp_(g, 1 - BETA1)
            second[name].lerp_(g.square(), 1 - BETA2)
            mean, square = first[name] / (1 - BETA1**step), second[name] / (1 - BETA2**step)
            values[name] = values[name] - rate * mean / (square.sqrt() + EPS)
        if step in due:
            moments = AdamMoments(_joined(first), _joined(second), step=step)
            yield WarmupState({name: tensor.clone() for name, tensor in values.items()}, moments, rate)


def _row(count: int, position: int, seed: int) -> int:
    return int(permutation(count, "warm-up", seed, position // count)[position % count])


def _joined(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()]).cpu()
