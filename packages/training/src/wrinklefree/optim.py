"""AdamW with the parameter groups that ternary training needs."""

import statistics
from collections import defaultdict
from typing import Any

import torch
from bitnet_arch import UserError, bitlinear_layers
from torch import nn

from wrinklefree.config import TrainingConfig


def relative_rates(model: nn.Module) -> dict[str, float]:
    """Return, for each ternary matrix, mean |W| over the median of all of them, at most 1, keyed by parameter name.

    An absolute step of an Adam-like optimiser moves a matrix by (rate / mean |W|) in the only unit its codes know.
    """
    means = {name: float(layer.weight.detach().float().abs().mean()) for name, layer in bitlinear_layers(model)}
    typical = statistics.median(means.values()) if means else 1.0
    return {f"{name}.weight": min(1.0, mean / typical) for name, mean in means.items()}


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters by weight decay and by the share of the learning rate that they get.

    Matrices decay; vectors (norms, biases) and embeddings do not. Each group carries `rate_share`.
    """
    rates = relative_rates(model) if config.relative_learning_rate else {}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in embeddings
            groups[config.weight_decay if decays else 0.0, rates.get(name, 1.0)].append(parameter)
    return [{"params": found, "weight_decay": decay, "rate_share": share} for (decay, share), found in groups.items()]


def train_gains_only(model: nn.Module) -> None:
    """Freeze everything but the gains of norms.

    Raises:
        UserError: if the model has none.
    """
    model.requires_grad_(False)
    gains = [m.weight for m in model.modules() if type(m).__name__.endswith(("Norm", "SubLN")) and hasattr(m, "weight")]
    for gain in gains:
        gain.requires_grad_(True)
    if not gains:
        raise UserError("training.trainable=gains trains norms, and the model has none with a gain: leave it out")


def build_optimizer(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW over `parameter_groups`."""
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=1e-8)
