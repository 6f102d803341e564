"""What benchmarks measure products with: loops that no interpreter slows down, and what the processor can do at best.

Functions that end in `_seconds` return what they took by the wall's clock; a caller may time them by a clock of its own.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

import bitnet_kernels
from bitnet_kernels import TernaryMatrix, _native
from bitnet_kernels._arrays import activations


def kernel_seconds(matrices: Sequence[TernaryMatrix], isa: str, x: NDArray[np.float32], repeats: int = 1) -> float:
    """Multiply one matrix after the other with activations that are quantised beforehand, on the caller's thread alone.

    Args:
        matrices: of one width.
        isa: the instruction set.
        x: float32 `[tokens, columns]`.
        repeats: how often, all of them.

    Raises:
        TypeError: for another dtype, or what is no array.
        ValueError: for another shape, an instruction set that is not available, or a number that is not positive.
    """
    return _native.time_kernel(_made(matrices, repeats), isa, _for_each(matrices, x), repeats)


def product_seconds(matrices: Sequence[TernaryMatrix], x: NDArray[np.float32], repeats: int = 1) -> float:
    """Multiply one matrix after the other as `TernaryMatrix.matmul` does: quantising x each time, on `bitnet_kernels.threads()`.

    Args:
        matrices: of one width.
        x: float32 `[tokens, columns]`.
        repeats: how often, all of them.

    Raises:
        TypeError: for another dtype, or what is no array.
        ValueError: for another shape, or a number that is not positive.
    """
    return _native.time_products(_made(matrices, repeats), bitnet_kernels.isa(), _for_each(matrices, x), repeats)


def read_seconds(matrices: Sequence[TernaryMatrix], repeats: int = 1) -> float:
    """Read the codes of one matrix after the other and do nothing else, on the caller's thread alone: the limit of bandwidth.

    Raises:
        ValueError: for a number of repeats that is not positive.
    """
    return _native.time_read(_made(matrices, repeats), repeats)[0]


def dot_seconds(count: int) -> tuple[float, int]:
    """Run at least `count` of the widest integer dot products, in chains that do not wait for each other: the integer peak.

    Returns:
        Seconds, and the multiplications and additions of bytes that it was; 0 where the processor has no such instruction.

    Raises:
        ValueError: for a number that is not positive.
    """
    return _native.time_dot(_positive("count", count))


def tile_seconds(count: int) -> tuple[float, int]:
    """Do what `dot_seconds` does with instructions that multiply whole tiles (AMX).

    Returns:
        As `dot_seconds`.

    Raises:
        ValueError: for a number that is not positive.
    """
    return _native.time_tiles(_positive("count", count))


def _positive(name: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{name}: a number from 1 on is wanted, not {number}")
    return number


def _made(matrices: Sequence[TernaryMatrix], repeats: int) -> list[_native.Matrix]:
    _positive("repeats", repeats)
    if not matrices:
        raise ValueError("matrices: at least one is wanted")
    return [matrix._matrix for matrix in matrices]


def _for_each(matrices: Sequence[TernaryMatrix], x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return x where all matrices can be multiplied with it: the loops check nothing."""
    widths = {matrix.columns for matrix in matrices}
    if len(widths) > 1:
        raise ValueError(f"matrices: equal numbers of columns are wanted, not {sorted(widths)}")
    return activations(x, widths.pop(), max(matrix.rows for matrix in matrices))
