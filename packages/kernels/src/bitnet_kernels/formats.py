"""GGUF's ternary tensor types: their numbers, sizes and scales. The codes themselves are converted natively.

Layouts: llama.cpp's `ggml-common.h`; for I2_S those of bitnet.cpp. Scales lie in the blocks, one f16 each; I2_S has one float32 a
tensor, behind the codes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GROUP = 128
"""Columns that share a scale, where a row has several."""

CODES, HF = 0, 1  # cpp/ternary/formats.h


@dataclass(frozen=True)
class Type:
    """One of GGUF's types.

    Attributes:
        name: as in llama.cpp, in lower case.
        number: ours (`cpp/ternary/formats.h`).
        ggml_id: ggml's.
        block: weights a block; a row must be a multiple of it.
        block_bytes: bytes a block, its scale included.
        scale_at: where in a block its f16 scale is; None for one float32 behind all blocks.
    """

    name: str
    number: int
    ggml_id: int
    block: int
    block_bytes: int
    scale_at: int | None

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the size of a matrix in bytes."""
        return rows * (columns // self.block) * self.block_bytes + (I2_S_TAIL if self.scale_at is None else 0)

    def read_scale(self, data: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.float32]:
        """Return a matrix's float32 scales as `[1]`, `[rows, 1]` or `[rows, ceil(columns / 128)]`: the coarsest that is exact.

        Raises:
            ValueError: for a scale that is not finite, or blocks of 64 whose scales differ within 128 columns.
        """
        if self.scale_at is None:
            scale = data[-I2_S_TAIL : 4 - I2_S_TAIL].copy().view("<f4").astype(np.float32)
            _check_finite(scale)
            return scale
        blocks = data.reshape(-1, self.block_bytes)
        f16 = np.ascontiguousarray(blocks[:, self.scale_at : self.scale_at + 2]).view("<f2")
        scales = f16.reshape(rows, columns // self.block).astype(np.float32)
        _check_finite(scales)
        if (scales == scales[0, 0]).all():
            return scales[0, :1].copy()
        if (scales == scales[:, :1]).all():
            return scales[:, :1].copy()
        if self.block >= GROUP:
            return np.repeat(scales, self.block // GROUP, axis=1)
        first, second = scales[:, ::2], scales[:, 1::2]
        if not np.array_equal(first[:, : second.shape[1]], second):
            raise ValueError(
                f"data: scales of {self.block} columns differ within {GROUP}, the finest that products know: "
                "make the weights ternary with a scale for each 128 columns, a row or the matrix"
            )
        return first.copy()

    def write_scale(self, data: NDArray[np.uint8], scale: NDArray[np.float32], rows: int, columns: int) -> None:
        """Write a matrix's scales into its bytes.

        Raises:
            ValueError: if the type cannot hold them exactly.
        """
        if self.scale_at is None:
            if scale.shape != (1,):
                raise ValueError(f"type: {self.name} holds one scale a matrix, not {list(scale.shape)}: choose another")
            data[-I2_S_TAIL : 4 - I2_S_TAIL] = scale.astype("<f4").view(np.uint8)
            return
        with np.errstate(over="ignore"):
            f16 = scale.astype("<f2")
        if not np.array_equal(f16.astype(np.float32), scale):
            worst = scale[f16.astype(np.float32) != scale].flat[0]
            raise ValueError(
                f"type: {self.name} holds float16 scales, which {worst:.9g} is not: round the scales first, or choose i2_s"
            )
        blocks = columns // self.block
        if scale.ndim == 2 and scale.shape[1] > 1:  # of groups
            if self.block < GROUP:
                f16 = np.repeat(f16, GROUP // self.block, axis=1)[:, :blocks]
            else:
                step = self.block // GROUP
                if not np.array_equal(np.repeat(f16[:, ::step], step, axis=1), f16):
                    raise ValueError(f"type: {self.name} has one scale for {self.block} columns, not for {GROUP}: choose q2_0")
                f16 = f16[:, ::step]
        spread = np.broadcast_to(f16, (rows, blocks)).reshape(-1, 1).copy().view(np.uint8)
        data.reshape(-1, self.block_bytes)[:, self.scale_at : self.scale_at + 2] = spread


I2_S_TAIL = 32

TYPES = {
    kind.name: kind
    for kind in (
        Type("i2_s", 2, 36, 128, 32, None),
        Type("tq1_0", 3, 34, 256, 54, 52),
        Type("tq2_0", 4, 35, 256, 66, 64),
        Type("q2_0", 5, 42, 64, 18, 0),
    )
}


def type_named(name: object, columns: int) -> Type:
    """Return a type by its name, in either case, for rows of that many columns.

    Raises:
        ValueError: for an unknown one, or a width that it cannot have.
    """
    kind = TYPES.get(name.lower()) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"type: one of {', '.join(TYPES)} is wanted, not {name!r:.60}")
    if columns % kind.block:
        raise ValueError(f"type: {kind.name} needs rows that are multiples of {kind.block}, not {columns}")
    return kind


def _check_finite(scales: NDArray[np.float32]) -> None:
    if not np.isfinite(scales).all():
        raise ValueError("data: a scale is a NaN or an infinity: the bytes are damaged or of another type")
