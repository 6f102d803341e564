"""Random projections of gradients that keep inner products (Johnson-Lindenstrauss), at any size.

Both are unbiased: E⟨Pu, Pv⟩ = ⟨u, v⟩. A pair's error has a standard deviation of at most about sqrt(2 / k) ‖u‖‖v‖.
"""

import math
from functools import lru_cache
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_handler.errors import UserError

ProjectionKind = Literal["none", "rademacher", "hadamard"]

BLOCK = 2**22
"""Numbers of the Rademacher matrix that exist at a time."""

RADIX = 64


class Projector(Protocol):
    """A linear map of the last dimension, the same for the same seed.

    Attributes:
        size: numbers that come in.
        dimension: numbers that go out.
        working: numbers that a vector needs in between.
    """

    size: int
    dimension: int
    working: int

    def __call__(self, x: Tensor) -> Tensor:
        """Map float32 [..., size] to [..., dimension]."""
        ...


class Identity:
    """No projection."""

    def __init__(self, size: int) -> None:
        self.size = self.dimension = size
        self.working = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


class Rademacher:
    """P = R / sqrt(k), R of independent signs [k, d] (LESS, arXiv 2402.04333, section 4.1; TRAK).

    The matrix never exists as a whole: blocks of its columns are drawn anew from (seed, block) at every call, which
    costs d·k random bits a call. Deviation: LESS draws on the GPU with `fast_jl`.
    """

    def __init__(self, size: int, dimension: int, seed: int = 0) -> None:
        self.size, self.dimension, self.seed = size, dimension, seed
        self.working = dimension
        self._rows = max(1, BLOCK // dimension)

    def __call__(self, x: Tensor) -> Tensor:
        """Map float32 [..., d] to [..., k]."""
        _check_size(x, self.size)
        out = x.new_zeros(*x.shape[:-1], self.dimension)
        for block, start in enumerate(range(0, self.size, self._rows)):
            rows = min(self._rows, self.size - start)
            out += x[..., start : start + rows] @ self._signs(block, rows).to(x.device, x.dtype)
        return out / math.sqrt(self.dimension)

    def _signs(self, block: int, rows: int) -> Tensor:
        """Return R's transposed block [rows, k] of ±1; raw PCG64 output, whose stream NumPy keeps from version to version."""
        count = rows * self.dimension
        words = np.random.PCG64([self.seed, block]).random_raw(-(-count // 64))
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count)
        return torch.from_numpy(bits.astype(np.float32)).mul_(2).sub_(1).view(rows, self.dimension)


class Hadamard:
    """P = sqrt(D / k) S H E: random signs E, the orthonormal Hadamard matrix H of size D, and k of its rows at random (S).

    A size that is no power of two is padded with zeros up to D = the next one, which changes no inner product. D log D operations
    and no random matrix. Source: Influence Distillation (arXiv 2505.19051), which applies two Hadamard matrices to the vector
    laid out as a square; H_D with D = A·B is exactly H_A ⊗ H_B, so that this is the same map at any size.
    """

    def __init__(self, size: int, dimension: int, seed: int = 0) -> None:
        self.size, self.dimension = size, dimension
        self.padded = 1 << (size - 1).bit_length()
        self.working = size + 3 * self.padded
        generator = torch.Generator().manual_seed(seed)
        self._signs = torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1).float()
        self._rows = torch.randperm(self.padded, generator=generator)[:dimension].sort().values

    def __call__(self, x: Tensor) -> Tensor:
        """Map float32 [..., d] to [..., k]."""
        _check_size(x, self.size)
        flipped = F.pad(x * self._signs.to(x.device, x.dtype), (0, self.padded - self.size))
        return walsh_hadamard(flipped)[..., self._rows.to(x.device)] * math.sqrt(self.padded / self.dimension)


def walsh_hadamard(x: Tensor) -> Tensor:
    """Return x H over the last dimension, H the orthonormal Sylvester matrix.

    Raises:
        UserError: if the last dimension is no power of two.
    """
    size = x.shape[-1]
    if size & (size - 1) or not size:
        raise UserError(f"a Hadamard transform needs a power of two, not {size}: pad with zeros")
    done = 1
    while done < size:
        # H is a Kronecker power: transform the last `radix` numbers, then rotate the axes; at the end they are in order again.
        radix = min(RADIX, size // done)
        columns = x.reshape(*x.shape[:-1], size // radix, radix) @ _sylvester(radix).to(x.device, x.dtype)
        x = columns.transpose(-1, -2).flatten(-2)
        done *= radix
    return x


def make_projector(kind: ProjectionKind, size: int, dimension: int, seed: int = 0) -> Projector:
    """Return a projector from `size` to `dimension`; vectors that are no longer than that are kept as they are.

    Raises:
        UserError: for an unknown kind or a dimension below 1.
    """
    if kind not in get_args(ProjectionKind):
        raise UserError(f"projection must be one of {', '.join(get_args(ProjectionKind))}, not {kind!r}")
    if dimension < 1:
        raise UserError(f"projection_dimension must be at least 1, not {dimension}")
    if kind == "none" or size <= dimension:
        return Identity(size)
    return Rademacher(size, dimension, seed) if kind == "rademacher" else Hadamard(size, dimension, seed)


def _check_size(x: Tensor, size: int) -> None:
    if x.shape[-1] != size:
        raise UserError(f"this projection is for vectors of {size} numbers, not {x.shape[-1]}: make another for them")


@lru_cache(maxsize=8)
def _sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix / math.sqrt(size)
