"""What callers pass in: checked, and as numpy arrays without copies where they can be."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitnet_kernels import _native

MOST_COLUMNS = _native.MOST_COLUMNS
"""A row's codes 0..2 times activations up to 127 add up to less than 2^31."""
MOST_ELEMENTS = 2**36
"""As many weights, activations or results as one call takes: no size in bytes overflows on its way."""

CPU = 1  # DLPack's number


def array(name: str, value: object, dtype: DTypeLike | tuple[type, ...]) -> NDArray[Any]:
    """Return an array of a dtype, or one of several, as numpy's: itself, or what DLPack (a torch tensor) or a buffer shows.

    Strides are as they are. See `contiguous`.

    Raises:
        TypeError: for another dtype, or what is no array.
        ValueError: for an array that is not in the CPU's memory, or does not let others read it.
    """
    if isinstance(value, np.ndarray):
        found: NDArray[Any] = np.asarray(value)  # not a subclass, whose indices might mean something else
    elif hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        found = _from_dlpack(name, value)
    else:
        try:
            found = np.asarray(memoryview(value))  # type: ignore[arg-type]
        except (TypeError, ValueError, NotImplementedError):
            raise TypeError(f"{name}: an array is wanted, not {type(value).__name__}") from None
    wanted = [np.dtype(kind) for kind in (dtype if isinstance(dtype, tuple) else (dtype,))]
    if found.dtype not in wanted:
        raise TypeError(f"{name}: {' or '.join(map(str, wanted))} is wanted, not {found.dtype}")
    return found


def _from_dlpack(name: str, value: Any) -> NDArray[Any]:
    try:
        device = value.__dlpack_device__()[0]
        if device == CPU:
            return np.from_dlpack(value)
    except Exception as error:  # producers raise what they like: for a gradient, a dtype that numpy lacks, a lazy tensor
        raise TypeError(f"{name}: this {type(value).__name__} shows no array ({' '.join(str(error).split())})") from None
    raise ValueError(f"{name}: an array in the CPU's memory is wanted, not on DLPack's device {device}")


def contiguous(found: NDArray[Any]) -> NDArray[Any]:
    """Return an array in C order, aligned to its elements: itself or a copy."""
    return np.require(found, requirements=["C", "A"])


def shape_of(name: str, shape: object) -> tuple[int, int]:
    """Return `(rows, columns)` as ints.

    Raises:
        TypeError: for what is no pair of integers.
        ValueError: for a matrix without elements, or one too large.
    """
    try:
        rows, columns = (int(size.__index__()) for size in shape)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        raise TypeError(f"{name}: two integers (rows, columns) are wanted, not {shape!r:.60}") from None
    if rows < 1 or columns < 1:
        raise ValueError(f"{name}: rows and columns from 1 on are wanted, not {[rows, columns]}")
    check_size(name, rows, columns)
    return rows, columns


def check_size(name: str, rows: int, columns: int) -> None:
    """Refuse what no sum or size in bytes can hold.

    Raises:
        ValueError: for more than 2^23 columns or 2^36 elements.
    """
    if columns > MOST_COLUMNS or rows * columns > MOST_ELEMENTS:
        raise ValueError(f"{name}: at most {MOST_COLUMNS} columns and {MOST_ELEMENTS} elements are possible, not {[rows, columns]}")


def activations(x: object, columns: int | None = None, rows: int = 1) -> NDArray[np.float32]:
    """Return contiguous float32 activations `[tokens, columns]`, of any number of columns with None, for results of `rows` a token.

    Raises:
        TypeError: for another dtype, or what is no array.
        ValueError: for another shape.
    """
    found = array("x", x, np.float32)
    if found.ndim != 2 or found.shape[1] != (columns or found.shape[1]) or found.shape[1] == 0:
        raise ValueError(f"x: a shape of [tokens, {columns or 'features'}] is wanted, not {list(found.shape)}")
    check_size("x", *found.shape)
    if found.shape[0] * rows > MOST_ELEMENTS:
        raise ValueError(f"x: at most {MOST_ELEMENTS} results are possible, not {found.shape[0]} x {rows}")
    return contiguous(found)
