"""`SubLN`: the RMSNorm that ternary layers put on their input."""

import torch
from torch import Tensor, nn

from bitnet_arch.configs import is_epsilon
from bitnet_arch.errors import UserError


def check_epsilon(name: str, value: float) -> None:
    """Refuse a stored epsilon that no norm can have.

    Raises:
        UserError: naming it, if it is negative, NaN or infinite.
    """
    if not is_epsilon(value):
        raise UserError(f"{name} is {value:g}, and a norm's epsilon is a number of at least 0: take an earlier checkpoint")


class SubLN(nn.Module):
    """RMSNorm `x · rsqrt(mean(x²) + ε) · γ` over the last dimension, with statistics in float32.

    ε is state, not configuration: a norm that is inserted into a pretrained model is softened by its own, often large ε (see
    `bitnet_arch.subln`), which has to travel with the weights.

    Attributes:
        weight: γ, `[features]`.
        eps: ε, 0-dim float32 buffer.
    """

    weight: nn.Parameter
    eps: Tensor

    def __init__(self, features: int, eps: float = 1e-5, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, device=device))
        self.register_buffer("eps", torch.tensor(eps, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., features]` to the same shape and dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight

    def extra_repr(self) -> str:
        """Describe the norm's width."""
        return f"{self.weight.shape[0]}"
