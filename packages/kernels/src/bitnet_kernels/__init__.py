"""Ternary matrix products on the CPU.

Weights are int8 codes in {-1, 0, 1} with float32 scales that multiply to dequantise; activations are quantised to 8 bits a token
as `bitnet_arch.quant.quantize_activation` does it. The instruction set is chosen when the package is imported: the fastest that the
processor has, or the one that the environment variable `WF_ISA` names.

Products run on `threads()` threads, and release the GIL: at first `WF_THREADS`, else `OMP_NUM_THREADS`, else as many as the process
may use processors. Results do not depend on their number.
"""

import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from bitnet_kernels import _native
from bitnet_kernels._arrays import MOST_ELEMENTS, activations, array, check_size, contiguous, shape_of
from bitnet_kernels.engine import Engine, Statistics
from bitnet_kernels.formats import CODES, GROUP, HF, type_named

__all__ = [
    "BLOCK_TYPES",
    "BlockMatrix",
    "Engine",
    "Statistics",
    "TernaryMatrix",
    "available_isas",
    "isa",
    "matmul_many",
    "quantize_activations",
    "set_threads",
    "threads",
    "use_isa",
]


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
        raise ValueError(
            f"isa '{' '.join(str(name).split())[:60]}' is not available here: choose one of {', '.join(available_isas())}"
        )
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
        TypeError: for what is no integer.
        ValueError: for a number outside 1 to 64.
    """
    if not isinstance(count, int):
        raise TypeError(f"count: a number of threads is wanted, not {type(count).__name__}")
    if not 1 <= count <= MOST_THREADS:
        raise ValueError(f"count: from 1 to {MOST_THREADS} threads are possible, not {count}")
    _native.set_threads(count)


_isa: str
try:
    use_isa(os.environ.get("WF_ISA") or _native.best_isa())
except ValueError as error:
    raise ValueError(f"WF_ISA: {error}") from None
if (_count := os.environ.get("WF_THREADS")) and not (_count.isascii() and _count.isdecimal() and 1 <= int(_count) <= MOST_THREADS):
    raise ValueError(f"WF_THREADS: from 1 to {MOST_THREADS} threads are possible, not {_count!r:.60}")


def quantize_activations(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise float32 activations `[tokens, features]`.

    Returns:
        int8 codes `[tokens, features]` and float32 scales `[tokens, 1]`, which multiply to dequantise.

    Raises:
        TypeError: for another dtype, or what is no array.
        ValueError: for another shape, or a value that is not finite.
    """
    return _native.quantize(_isa, activations(x))


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
            TypeError: for another dtype, or what is no array.
            ValueError: for another shape, or a code that is not -1, 0 or 1.
        """
        found = array("codes", codes, np.int8)
        if found.ndim != 2 or 0 in found.shape:
            raise ValueError(f"codes: a shape of [rows, columns] is wanted, not {list(found.shape)}")
        rows, columns = found.shape
        check_size("codes", rows, columns)
        self._set(CODES, "codes", contiguous(found).view(np.uint8), rows, columns, scale)

    @classmethod
    def from_hf(cls, packed: NDArray[np.uint8], scale: NDArray[np.float32]) -> "TernaryMatrix":
        """Return a matrix from the codes of a Hugging Face `bitnet` checkpoint, uint8 `[rows / 4, columns]`.

        Args:
            packed: byte (r, c) holds the rows r, r + rows / 4, r + rows / 2 and r + 3 rows / 4 from the lowest bits up.
            scale: float32 `[1]`, `[rows, 1]` or `[rows, ceil(columns / 128)]`; multiplies to dequantise. Where a checkpoint
                stores the inverse (`linear_class: bitlinear`), it is the caller's to invert.

        Raises:
            TypeError: for another dtype, or what is no array.
            ValueError: for another shape, or the unused bit pair 3.
        """
        found = array("packed", packed, np.uint8)
        if found.ndim != 2 or 0 in found.shape:
            raise ValueError(f"packed: a shape of [rows / 4, columns] is wanted, not {list(found.shape)}")
        check_size("packed", 4 * found.shape[0], found.shape[1])
        matrix = cls.__new__(cls)
        matrix._set(HF, "packed", contiguous(found), 4 * found.shape[0], found.shape[1], scale)
        return matrix

    @classmethod
    def from_gguf(cls, type: str, data: NDArray[np.uint8] | bytes, shape: tuple[int, int]) -> "TernaryMatrix":  # noqa: A002
        """Return a matrix from a GGUF tensor's bytes.

        Args:
            type: "i2_s", "tq1_0", "tq2_0" or "q2_0".
            data: the bytes, in an array of any shape or a buffer.
            shape: (rows, columns), which is the reverse of the order in the file.

        Raises:
            TypeError: for another dtype, or what is no buffer.
            ValueError: for an unknown type, a width that it cannot have, a size that is not the shape's, a code that is not
                ternary, or scales that differ within 128 columns.
        """
        rows, columns = shape_of("shape", shape)
        kind = type_named(type, columns)
        found = array("data", data, np.uint8)
        if found.size != kind.nbytes(rows, columns):
            raise ValueError(f"data: {kind.name} {[rows, columns]} has {kind.nbytes(rows, columns)} bytes, not {found.size}")
        found = contiguous(found).reshape(-1)
        matrix = cls.__new__(cls)
        matrix._set(kind.number, "data", found, rows, columns, kind.read_scale(found, rows, columns))
        return matrix

    def _set(self, layout: int, name: str, data: NDArray[np.uint8], rows: int, columns: int, scale: NDArray[np.float32]) -> None:
        scales = array("scale", scale, np.float32)
        granularity = {(rows, -(-columns // GROUP)): 2, (rows, 1): 1, (1,): 0}.get(scales.shape)
        if granularity is None:
            groups = -(-columns // GROUP)
            raise ValueError(f"scale: a shape of [1], [{rows}, 1] or [{rows}, {groups}] is wanted, not {list(scales.shape)}")
        self._matrix = _native.Matrix(layout, name, data.reshape(-1), rows, columns, contiguous(scales), granularity)
        self.rows, self.columns, self.nbytes = rows, columns, self._matrix.nbytes

    @property
    def scale(self) -> NDArray[np.float32]:
        """A copy of the scale, `[1]`, `[rows, 1]` or `[rows, ceil(columns / 128)]`; multiplies to dequantise."""
        return self._matrix.scale()

    def codes(self) -> NDArray[np.int8]:
        """Return the int8 codes `[rows, columns]`."""
        return self._matrix.unpack(CODES, self.rows * self.columns).view(np.int8).reshape(self.rows, self.columns)

    def to_hf(self) -> NDArray[np.uint8]:
        """Return what `from_hf` takes as `packed`, uint8 `[rows / 4, columns]`.

        Raises:
            ValueError: if the rows are not a multiple of 4.
        """
        if self.rows % 4:
            raise ValueError(f"rows: Hugging Face's layout needs a multiple of 4, not {self.rows}")
        return self._matrix.unpack(HF, self.rows // 4 * self.columns).reshape(self.rows // 4, self.columns)

    def to_gguf(self, type: str) -> NDArray[np.uint8]:  # noqa: A002
        """Return a GGUF tensor's bytes, uint8 `[bytes]`, which hold exactly this matrix.

        Args:
            type: "i2_s", "tq1_0", "tq2_0" or "q2_0".

        Raises:
            ValueError: for an unknown type, or one that cannot hold this width or these scales.
        """
        kind = type_named(type, self.columns)
        data = self._matrix.unpack(kind.number, kind.nbytes(self.rows, self.columns))
        kind.write_scale(data, self.scale, self.rows, self.columns)
        return data

    def matmul(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `x @ weightᵀ`, `[tokens, rows]`, of float32 activations `[tokens, columns]`, which are quantised.

        Raises:
            TypeError: for another dtype, or what is no array.
            ValueError: for another shape, or a value that is not finite.
        """
        return self._matrix.matmul(_isa, activations(x, self.columns, self.rows))

    def matmul_at(self, x: int, tokens: int, y: int) -> None:
        """Write `matmul`'s result into memory: for callers whose products are so short that describing an array would show.

        Nothing is checked, and a wrong address ends the process.

        Args:
            x: address of contiguous float32 `[tokens, columns]`.
            tokens: how many.
            y: address of contiguous float32 `[tokens, rows]`; NaN for tokens that hold a NaN or an infinity.
        """
        _native.multiply_at(self._matrix, _isa, x, tokens, y)

    def matmul_integer(self, x: NDArray[np.float32]) -> NDArray[np.int32]:
        """Return the integer sums of the same product, before any scale."""
        return self._matrix.matmul_integer(_isa, activations(x, self.columns, self.rows))


BLOCK_TYPES = ("q8_0", "q6_k", "q4_1")
"""llama.cpp's types that a `BlockMatrix` can have."""


class BlockMatrix:
    """A matrix `[rows, columns]` of 8, 6 or 4 bits with a scale for each few columns: an embedding or a head.

    It is made from the bytes that GGUF files hold, which are put in another order, and stands for exactly the same weights.
    Activations are multiplied as the float32 they are, as training's head does it.

    Attributes:
        rows: rows.
        columns: columns.
        nbytes: bytes of codes and scales.
    """

    def __init__(self, data: NDArray[np.uint8], kind: str, columns: int) -> None:
        """Pack uint8 `[rows, bytes of a row]` of a type in `BLOCK_TYPES`.

        Raises:
            TypeError: for another dtype, or what is no array.
            ValueError: for another type or shape, or columns that are no multiple of the type's block (32, for q6_k 256).
        """
        if kind not in BLOCK_TYPES:
            raise ValueError(f"kind: {' or '.join(BLOCK_TYPES)} is wanted, not {kind!r:.60}")
        found = array("data", data, np.uint8)
        columns = shape_of("columns", (1, columns))[1]
        wanted = _native.row_bytes(BLOCK_TYPES.index(kind), columns)
        if wanted == 0:
            raise ValueError(f"columns: {kind} needs a multiple of {256 if kind == 'q6_k' else 32}, not {columns}")
        if found.ndim != 2 or found.shape[1] != wanted or len(found) == 0:
            raise ValueError(f"data: a shape of [rows, {wanted}] is wanted, not {list(found.shape)}")
        rows, columns = shape_of("data", (len(found), columns))
        self._matrix = _native.Blocks(BLOCK_TYPES.index(kind), contiguous(found), columns)
        self.rows, self.columns, self.nbytes = rows, columns, self._matrix.nbytes

    def lookup(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the float32 rows `[len(ids), columns]` of int64 ids `[n]`.

        Raises:
            TypeError: for another dtype, or what is no array.
            ValueError: for another shape, or an id that is no row.
        """
        found = array("ids", ids, np.int64)
        if found.ndim != 1:
            raise ValueError(f"ids: a shape of [n] is wanted, not {list(found.shape)}")
        if len(found) and not 0 <= found.min() <= found.max() < self.rows:
            raise ValueError(f"ids: from 0 to {self.rows - 1} are wanted, not {found.min()} to {found.max()}")
        if len(found) * self.columns > MOST_ELEMENTS:
            raise ValueError(f"ids: at most {MOST_ELEMENTS} results are possible, not {len(found)} x {self.columns}")
        return self._matrix.rows(contiguous(found))

    def matmul(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `x @ weightᵀ`, `[tokens, rows]`, of float32 activations `[tokens, columns]`, which are not quantised.

        Raises:
            TypeError: for another dtype, or what is no array.
            ValueError: for another shape, or a value that is not finite.
        """
        return self._matrix.matmul(_isa, activations(x, self.columns, self.rows))


def matmul_many(matrices: Iterable[TernaryMatrix], x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Return every matrix's `x @ weightᵀ` as `TernaryMatrix.matmul` does, quantising x once: q, k and v, or gate and up.

    Raises:
        TypeError: for what is no matrix, or as `TernaryMatrix.matmul`.
        ValueError: for matrices of different widths, or as `TernaryMatrix.matmul`.
    """
    if not isinstance(matrices, Iterable):
        raise TypeError(f"matrices: several TernaryMatrix are wanted, not {type(matrices).__name__}")
    matrices = list(matrices)
    for matrix in matrices:
        if not isinstance(matrix, TernaryMatrix):
            raise TypeError(f"matrices: each is wanted to be a TernaryMatrix, not {type(matrix).__name__}")
    widths = {matrix.columns for matrix in matrices}
    if len(widths) > 1:
        raise ValueError(f"matrices: equal numbers of columns are wanted, not {sorted(widths)}")
    x = activations(x, next(iter(widths), None), sum(matrix.rows for matrix in matrices))
    return _native.matmul_many([matrix._matrix for matrix in matrices], _isa, x)
