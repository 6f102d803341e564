"""How inference engines round activations before a product with a quantised matrix, as pure functions.

llama.cpp pairs every weight type with a type for the other operand: TQ1_0 and TQ2_0 with `q8_K` (256-blocks), Q2_0 with `q8_0`
(32-blocks). Sources: ggml's `quantize_row_q8_K_ref` and `quantize_row_q8_0`. Training rounds per token instead.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitnet_arch.gguf.types import F16, TYPES

Rounding = Callable[[Tensor], Tensor]
"""Maps `[..., features]` to the same shape and dtype, as if through the engine's codes."""


def identity(x: Tensor) -> Tensor:
    """Leave activations as they are."""
    return x


def round_q8_k(x: Tensor) -> Tensor:
    """Round to 8 bits in blocks of 256 along the last dimension.

    The element of largest magnitude becomes -127 times a float32 step, whose sign is therefore free; codes are clipped at 127.
    """
    blocks: Tensor = x.float().unflatten(-1, (-1, 256))
    extreme = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
    # Tensor by tensor: torch divides a number by a tensor through the reciprocal, which is one rounding more than the engine's.
    inverse = torch.full_like(extreme, -127.0) / torch.where(extreme == 0, 1.0, extreme)
    rounded: Tensor = (blocks * inverse).round().clamp(max=127) * inverse.reciprocal()
    return rounded.flatten(-2).to(x.dtype)


def round_q8_0(x: Tensor) -> Tensor:
    """Round to 8 bits in blocks of 32 along the last dimension; a block's step is stored in f16, which its codes do not see."""
    blocks: Tensor = x.float().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    step = (largest / 127.0).half().float()
    inverse = torch.where(largest == 0, 0.0, torch.full_like(largest, 127.0) / largest)
    rounded: Tensor = (blocks * inverse).round() * step
    return rounded.flatten(-2).to(x.dtype)


BY_WEIGHT_TYPE: dict[int, Rounding] = {
    F16: identity,
    TYPES["tq1_0"].ggml_id: round_q8_k,
    TYPES["tq2_0"].ggml_id: round_q8_k,
    TYPES["q2_0"].ggml_id: round_q8_0,
}
"""Maps a matrix's ggml type to the rounding of what it is multiplied with."""
