"""What surrounds the ternary products of a decoder: RMS norm, rotary embedding, attention over kept keys and values, in float32."""

from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_kernels import _native, isa
from bitnet_kernels._arrays import activations, array, check_size, contiguous

KV_TYPES = ("f32", "f16", "int8")
"""What a `KvCache` keeps: single or half precision, or 8 bits with a scale for each head's vector."""


def rms_norm(x: NDArray[np.float32], weight: NDArray[np.float32], epsilon: float) -> NDArray[np.float32]:
    """Return `x / sqrt(mean(x²) + epsilon) * weight` of float32 `[tokens, features]` and weight `[features]`.

    Raises:
        TypeError: for another dtype, what is no array, or an epsilon that is no number.
        ValueError: for another shape, or an epsilon that is negative or not finite.
    """
    found = activations(x)
    number = _number("epsilon", epsilon)
    if number < 0:
        raise ValueError(f"epsilon: a number from 0 on is wanted, not {epsilon}")
    return _native.rms_norm(isa(), found, _shaped("weight", weight, (found.shape[1],)), number)


def rope(x: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return float32 `[tokens, heads, head_dim]` rotated by angles whose cosines and sines are `[tokens, half]`, in NEOX's order.

    Features i and i + half of a head are a pair, as in transformers' `rotate_half`; features from 2 · half on stay as they are.

    Raises:
        TypeError: for another dtype, or what is no array.
        ValueError: for another shape.
    """
    found = _shaped("x", x, (None, None, None))
    tokens, _, head_dim = found.shape
    cosines = _shaped("cos", cos, (tokens, None))
    half = cosines.shape[1]
    if not 0 < 2 * half <= head_dim:
        raise ValueError(f"cos: from 1 to {head_dim // 2} angles a token are wanted, not {half}")
    return _native.rope(isa(), found, cosines, _shaped("sin", sin, (tokens, half)))


class KvCache:
    """Keys and values of one layer, appended token by token, and attention over them."""

    def __init__(self, kind: str, heads: int, head_dim: int, capacity: int) -> None:
        """Make room for `capacity` positions of `heads` heads.

        Raises:
            TypeError: for a size that is no integer.
            ValueError: for a type that is not in `KV_TYPES`, or a size below 1.
        """
        if not isinstance(kind, str) or kind not in KV_TYPES:
            raise ValueError(f"kind: {' or '.join(KV_TYPES)} is wanted, not {kind!r:.60}")
        for name, size in (("heads", heads), ("head_dim", head_dim), ("capacity", capacity)):
            if not isinstance(size, Integral):
                raise TypeError(f"{name}: an integer is wanted, not {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name}: a number from 1 on is wanted, not {size}")
        heads, head_dim, capacity = int(heads), int(head_dim), int(capacity)
        check_size("capacity", capacity, heads * head_dim)
        self._cache = _native.Kv(KV_TYPES.index(kind), heads, head_dim, capacity)
        self.heads, self.head_dim, self.capacity = heads, head_dim, capacity

    def __len__(self) -> int:
        return self._cache.positions

    def append(self, keys: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """Keep float32 keys and values `[tokens, heads, head_dim]` of the next positions.

        Raises:
            TypeError: for another dtype, or what is no array.
            ValueError: for another shape, a value that is not finite, or more tokens than there is room for.
        """
        found = _shaped("keys", keys, (None, self.heads, self.head_dim))
        if len(self) + len(found) > self.capacity:
            raise ValueError(f"keys: there is room for {self.capacity - len(self)} tokens, not {len(found)}")
        added = _finite("values", _shaped("values", values, found.shape))
        self._cache.append(isa(), _finite("keys", found), added)

    def attention(self, q: NDArray[np.float32], ranges: NDArray[np.int64], scale: float) -> NDArray[np.float32]:
        """Return softmax(scale · q · keysᵀ) · values, `[tokens, query heads, head_dim]`.

        Args:
            q: float32 `[tokens, query heads, head_dim]`; each head of keys serves several query heads that follow each other.
            ranges: int64 `[tokens, 2]`, the first position that a token attends to and the one behind the last. This is the mask:
                (0, p + 1) is causal, (p + 1 - window, p + 1) a sliding window, (0, end of the block) bidirectional within a block.
                Where a range is empty the result is 0.
            scale: usually 1 / sqrt(head_dim).

        Raises:
            TypeError: for another dtype, what is no array, or a scale that is no number.
            ValueError: for another shape, a range that leaves the kept positions, or a q or scale that is not finite.
        """
        found = _shaped("q", q, (None, None, self.head_dim))
        if found.shape[1] == 0 or found.shape[1] % self.heads:
            raise ValueError(f"q: a multiple of {self.heads} heads is wanted, not {found.shape[1]}")
        limits = array("ranges", ranges, np.int64)
        if limits.shape != (len(found), 2):
            raise ValueError(f"ranges: a shape of [{len(found)}, 2] is wanted, not {list(limits.shape)}")
        limits = contiguous(limits)
        if limits.size and not (limits.min() >= 0 and limits.max() <= len(self) and (limits[:, 0] <= limits[:, 1]).all()):
            raise ValueError(f"ranges: first <= last within 0 and {len(self)} are wanted")
        return self._cache.attention(isa(), _finite("q", found), limits, _number("scale", scale))


def _shaped(name: str, value: object, wanted: tuple[int | None, ...]) -> NDArray[Any]:
    found = array(name, value, np.float32)
    if found.ndim != len(wanted) or any(size not in (None, own) for size, own in zip(wanted, found.shape, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in wanted)
        raise ValueError(f"{name}: a shape of [{sizes}] is wanted, not {list(found.shape)}")
    return contiguous(found)


def _finite(name: str, found: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(found).all():
        raise ValueError(f"{name}: finite values are wanted, not NaN or infinity")
    return found


def _number(name: str, value: object) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"{name}: a number is wanted, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = np.inf
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name}: a finite float32 is wanted, not {value!r:.60}")
    return number
