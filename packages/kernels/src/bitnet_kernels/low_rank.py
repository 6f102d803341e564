"""A low-rank correction of ternary products, `bitnet_arch.lrc`'s: `U Vᵀ x` of activations that are not quantised."""

import numpy as np
from numpy.typing import NDArray

import bitnet_kernels
from bitnet_kernels import _native
from bitnet_kernels._arrays import activations, array, check_size, contiguous

TYPES = (np.float16, np.int8)


class LowRank:
    """Adapters U and V in float16, or in int8 with a float32 scale for each of their columns; sums are taken in float32.

    Attributes:
        rows: outputs.
        columns: inputs.
        rank: columns of U and of V.
    """

    def __init__(
        self,
        u: NDArray[np.float16] | NDArray[np.int8],
        v: NDArray[np.float16] | NDArray[np.int8],
        u_scale: NDArray[np.float32] | None = None,
        v_scale: NDArray[np.float32] | None = None,
    ) -> None:
        """Take adapters.

        Args:
            u: `[rows, rank]`, float16 or int8.
            v: `[columns, rank]`, of the same dtype.
            u_scale: `[rank]`, multiplies U's columns; int8 needs it, float16 has none.
            v_scale: the same of V.

        Raises:
            TypeError: for another dtype, or what is no array.
            ValueError: for shapes that do not fit, or a scale that is missing or that does not belong.
        """
        first = array("u", u, TYPES)
        kind = first.dtype
        found = [first, array("v", v, kind)]
        for name, scale in (("u_scale", u_scale), ("v_scale", v_scale)):
            if (scale is not None) != (kind == np.int8):
                raise ValueError(f"{name}: int8 needs a scale and float16 has none, but u is {kind}")
        for name, adapter in zip("uv", found, strict=True):
            if adapter.ndim != 2 or 0 in adapter.shape or adapter.shape[1] != found[0].shape[1]:
                raise ValueError(
                    f"{name}: a shape of [features, rank] is wanted, with one rank for u and v, not {list(adapter.shape)}"
                )
            check_size(name, *adapter.shape)
        self.rows, self.columns, self.rank = found[0].shape[0], found[1].shape[0], found[0].shape[1]
        scales = [self._scale("u_scale", u_scale), self._scale("v_scale", v_scale)]
        numbers = [contiguous(adapter).view(np.uint8).reshape(-1) for adapter in found]
        shape = self.rows, self.columns, self.rank
        self._native = _native.LowRank(TYPES.index(kind.type), numbers[0], numbers[1], scales[0], scales[1], *shape)

    def _scale(self, name: str, scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
        if scale is None:
            return np.ones(self.rank, np.float32)
        found = array(name, scale, np.float32)
        if found.shape != (self.rank,):
            raise ValueError(f"{name}: a shape of [{self.rank}] is wanted, not {list(found.shape)}")
        return contiguous(found)

    def matmul(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `U Vᵀ x`, float32 `[tokens, rows]`, of float32 activations `[tokens, columns]`.

        Raises:
            TypeError: for another dtype, or what is no array.
            ValueError: for another shape.
        """
        found = activations(x, self.columns, self.rows)
        y = np.zeros((len(found), self.rows), np.float32)
        self.add_at(found.ctypes.data, len(found), y.ctypes.data)
        return y

    def add_at(self, x: int, tokens: int, y: int) -> None:
        """Add `matmul`'s result to what lies in memory. Nothing is checked, and a wrong address ends the process.

        Args:
            x: address of contiguous float32 `[tokens, columns]`.
            tokens: how many.
            y: address of contiguous float32 `[tokens, rows]`, which is added to.
        """
        self._native.add_at(bitnet_kernels.isa(), x, tokens, y)
