"""Ternary matrix products on the CPU.

Weights are int8 codes in {-1, 0, 1} with float32 scales that multiply to dequantise; activations are quantised to 8 bits a token
as `bitnet_arch.quant.quantize_activation` does it. The instruction set is chosen when the package is imported: the fastest that the
processor has, or the one that the environment variable `WF_ISA` names.
"""

import os

import numpy as np
from numpy.typing import NDArray

from bitnet_kernels import _native

__all__ = ["TernaryMatrix", "available_isas", "isa", "quantize_activations", "use_isa"]

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


def _activations(x: NDArray[np.float32], columns: int | None = None) -> NDArray[np.float32]:
    if x.ndim != 2 or x.dtype != np.float32 or x.shape[1] != (columns or x.shape[1]) or x.shape[1] == 0:
        wanted = f"float32 [tokens, {columns or 'features'}]"
        raise ValueError(f"x: {wanted} is wanted, not {x.dtype} {list(x.shape)}")
    return np.ascontiguousarray(x)
