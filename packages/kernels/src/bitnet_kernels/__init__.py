"""Ternary matrix products on the CPU.

Weights are int8 codes in {-1, 0, 1} with float32 scales that multiply to dequantise; activations are quantised to 8 bits a token
as `bitnet_arch.quant.quantize_activation` does it. The instruction set is chosen when the package is imported: the fastest that the
processor has, or the one that the environment variable `WF_ISA` names.

Products run on `threads()` threads, and release the GIL: at first `WF_THREADS`, else `OMP_NUM_THREADS`, else as many as the process
may use processors. Results do not depend on their number.
"""

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitnet_kernels import _native

__all__ = [
    "TernaryMatrix",
    "available_isas",
    "isa",
    "matmul_many",
    "quantize_activations",
    "set_threads",
    "threads",
    "use_isa",
]

GROUP = 128
"""Columns that share a scale, where a row has several."""


def available_isas() -> list[str]:
    """Return the instruction sets that this build and this processor have, slowest first."""
    return list(_native.available_isas())


def use_isa(name: str) -> None:
    """Use an instruction set from here on.

    Raises:
        ValueError: for one that this build or this processor does not have.
    """
    global _isa
    if name not in available_isas():
        raise ValueError(f"isa '{name}' is not available here: choose one of {', '.join(available_isas())}")
    _isa = name


def isa() -> str:
    """Return the name of the instruction set in use."""
    return _isa


MOST_THREADS = 64
"""As many threads as there can be."""


def threads() -> int:
    """Return how many threads a product runs on, the caller's included."""
    return _native.threads()


def set_threads(count: int) -> None:
    """Let products run on that many threads from here on; with 1, on the caller's alone.

    Raises:
        ValueError: for a number outside 1 to 64.
    """
    if not 1 <= count <= MOST_THREADS:
        raise ValueError(f"count: from 1 to {MOST_THREADS} threads are possible, not {count}")
    _native.set_threads(count)


_isa: str
use_isa(os.environ.get("WF_ISA") or _native.best_isa())


def quantize_activations(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise float32 activations `[tokens, features]`.

    Returns:
        int8 codes `[tokens, features]` and float32 scales `[tokens, 1]`, which multiply to dequantise.

    Raises:
        ValueError: for another shape or dtype, or a value that is not finite.
    """
    return _native.quantize(_isa, _activations(x))


class TernaryMatrix:
    """A packed ternary matrix `[rows, columns]`, at 2 bits a weight.

    Attributes:
        rows: rows.
        columns: columns.
        nbytes: bytes of the codes.
    """

    def __init__(self, codes: NDArray[np.int8], scale: NDArray[np.float32]) -> None:
        """Pack int8 codes `[rows, columns]` with a float32 scale `[1]`, `[rows, 1]` or `[rows, ceil(columns / 128)]`.

        Raises:
            ValueError: for another shape or dtype, or a code that is not -1, 0 or 1.
        """
        if codes.ndim != 2 or codes.dtype != np.int8 or 0 in codes.shape:
            raise ValueError(f"codes: int8 [rows, columns] is wanted, not {codes.dtype} {list(codes.shape)}")
        rows, columns = codes.shape
        granularity = {(1,): 0, (rows, 1): 1, (rows, -(-columns // GROUP)): 2}.get(scale.shape)
        if granularity is None or scale.dtype != np.float32:
            raise ValueError(f"scale: float32 [1], [rows, 1] or [rows, groups] is wanted, not {scale.dtype} {list(scale.shape)}")
        self._matrix = _native.Matrix(np.ascontiguousarray(codes), np.ascontiguousarray(scale), granularity)
        self.rows, self.columns, self.nbytes = rows, columns, self._matrix.nbytes

    def codes(self) -> NDArray[np.int8]:
        """Return the int8 codes `[rows, columns]`."""
        return self._matrix.codes()

    def matmul(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `x @ weightᵀ`, `[tokens, rows]`, of float32 activations `[tokens, columns]`, which are quantised.

        Raises:
            ValueError: for another shape or dtype, or a value that is not finite.
        """
        return self._matrix.matmul(_isa, _activations(x, self.columns))

    def matmul_integer(self, x: NDArray[np.float32]) -> NDArray[np.int32]:
        """Return the integer sums of the same product, before any scale."""
        return self._matrix.matmul_integer(_isa, _activations(x, self.columns))


def matmul_many(matrices: Sequence[TernaryMatrix], x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Return every matrix's `x @ weightᵀ` as `TernaryMatrix.matmul` does, quantising x once: q, k and v, or gate and up.

    Raises:
        ValueError: for matrices of different widths, or as `TernaryMatrix.matmul`.
    """
    widths = {matrix.columns for matrix in matrices}
    if len(widths) > 1:
        raise ValueError(f"matrices: equal numbers of columns are wanted, not {sorted(widths)}")
    return _native.matmul_many([matrix._matrix for matrix in matrices], _isa, _activations(x, *widths))


def _activations(x: NDArray[np.float32], columns: int | None = None) -> NDArray[np.float32]:
    if x.ndim != 2 or x.dtype != np.float32 or x.shape[1] != (columns or x.shape[1]) or x.shape[1] == 0:
        wanted = f"float32 [tokens, {columns or 'features'}]"
        raise ValueError(f"x: {wanted} is wanted, not {x.dtype} {list(x.shape)}")
    return np.ascontiguousarray(x)
