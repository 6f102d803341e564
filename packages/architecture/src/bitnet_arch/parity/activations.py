"""How inference engines round activations before a product with a stored matrix, as pure functions.

llama.cpp's CPU path pairs every weight type with a type for the other operand: TQ1_0, TQ2_0 and Q6_K with `q8_K` (256-blocks), Q2_0
and Q8_0 with `q8_0` (32-blocks), Q4_1 with `q8_1` (the same, and the sum of a block's codes), BF16 with bf16. Sources: ggml's
`type_traits_cpu`, `quantize_row_q8_K_ref` and `quantize_row_q8_0`. Training rounds per token instead.

What agrees best was measured: mean KL in nats over 48 positions of an untied Llama of two layers, trained for 60 steps, of
`xllamacpp` 2026.10 against torch:

| what | other operand exact | as below |
|---|---|---|
| F16 matrices and head | 1.05e-8 | (in f16: 1.03e-8) |
| BF16 matrices | 1.9e-7 | 4.3e-8 |
| BF16 head | 2.2e-7 | 4.9e-8 |
| Q8_0 head | 1.9e-6 | 1.8e-7 |
| Q6_K head | 3.0e-6 | 1.6e-7 (by 32: 4.2e-6) |
| Q4_1 head | 2.0e-6 | 1.6e-7 |

Deviations: F16's other operand stays exact, which cannot be told from f16 in those figures. `q8_1` keeps its sum in f16, which is
left out: with it the figure is the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitnet_arch.gguf.floats import Q4_1, Q6_K, Q8_0
from bitnet_arch.gguf.types import BF16, F16, TYPES

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


def round_bf16(x: Tensor) -> Tensor:
    """Round to bfloat16, half to even."""
    return x.bfloat16().to(x.dtype)


BY_WEIGHT_TYPE: dict[int, Rounding] = {
    F16: identity,
    BF16: round_bf16,
    TYPES["tq1_0"].ggml_id: round_q8_k,
    TYPES["tq2_0"].ggml_id: round_q8_k,
    TYPES["q2_0"].ggml_id: round_q8_0,
    Q8_0: round_q8_0,
    Q6_K: round_q8_k,
    Q4_1: round_q8_0,
}
"""Maps the ggml type of a matrix or a head to the rounding of what it is multiplied with."""

CODES = frozenset(kind for kind, rounding in BY_WEIGHT_TYPE.items() if rounding in (round_q8_k, round_q8_0))
"""Types whose other operand becomes 8-bit codes: one rounding edge crossed shows in the distribution."""
