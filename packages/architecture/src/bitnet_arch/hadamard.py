"""The block Hadamard rotation of BitNet v2 (arXiv 2504.18415), for widths that are no powers of two, too.

A rotation in front of the activation quantiser spreads outliers over all channels. The inverse goes into the weights, so that the
float layer computes the same.

Deviation: BitNet v2 uses widths that are powers of two and one transform over all of them. Here a width n = b · m, with b its
largest power of two, is rotated in m blocks of b (576 = 64 · 9, 1536 = 512 · 3).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from bitnet_arch.errors import UserError


def block_size(width: int) -> int:
    """Return the largest power of two that divides `width`."""
    return width & -width


def rotate(x: Tensor) -> Tensor:
    """Apply the rotation to the last dimension; it is symmetric and orthogonal, so that applying it twice changes nothing.

    Args:
        x: `[..., features]`, floating point.

    Returns:
        Same shape and dtype.

    Raises:
        UserError: if the width is odd, for which the rotation would be the identity.
    """
    width = x.shape[-1]
    size = block_size(width)
    if size == 1:
        raise UserError(f"a width of {width} is odd and cannot be rotated: choose rotation=False")
    matrix = _hadamard(size).to(x.device, x.dtype)
    blocks: Tensor = x.reshape(*x.shape[:-1], width // size, size)
    return (blocks @ matrix).flatten(-2)


@lru_cache(maxsize=16)
def _hadamard(size: int) -> Tensor:
    """Return the normalised Sylvester matrix `[size, size]`, float32."""
    matrix = torch.ones(1, 1)
    base = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for _ in range(size.bit_length() - 1):
        matrix = torch.kron(matrix, base)
    return matrix / math.sqrt(size)
