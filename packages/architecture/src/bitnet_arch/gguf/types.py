"""GGUF's ternary tensor types as pure functions on numpy arrays.

A block type stores codes in blocks along a row, each with a scale in f16. The codes are made by absmean before packing: the packers
of other tools take a block's absolute maximum as its scale, which turns a float matrix into garbage. I2_S has one scale a tensor.
Layouts: ggml's `ggml-common.h` and `ggml-quants.c`; for I2_S those of bitnet.cpp. The types of other tensors are in
`bitnet_arch.gguf.floats`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitnet_arch.errors import UserError

Codes = NDArray[np.int8]
Bytes = NDArray[np.uint8]

SMALLEST_NORMAL_F16 = 2.0**-14


@dataclass(frozen=True)
class TernaryType:
    """One ternary block type, which llama.cpp runs.

    Attributes:
        name: as on the command line.
        ggml_id: ggml's number.
        block: weights a block; a row must be a multiple of it.
        block_bytes: bytes a block, its f16 scale included.
        pack: codes `[blocks, block]` to code bytes `[blocks, block_bytes - 2]`.
        unpack: the inverse.
        scale_first: whether the scale precedes the code bytes.
    """

    name: str
    ggml_id: int
    block: int
    block_bytes: int
    pack: Callable[[Codes], Bytes]
    unpack: Callable[[Bytes], Codes]
    scale_first: bool

    def encode(self, codes: Codes, scale: np.float16 | NDArray[np.float16]) -> Bytes:
        """Return the bytes `[out, row_bytes]` of int8 codes `[out, in]`.

        Args:
            codes: in {-1, 0, 1}.
            scale: one for the tensor, or a matrix that broadcasts to one a block, `[out, in / block]`.

        Raises:
            UserError: if the row width is not a multiple of the block.
        """
        rows, width = codes.shape
        if width % self.block:
            raise UserError(
                f"{self.name.upper()} needs rows that are multiples of {self.block}, not {width}: use --type auto, "
                "which picks an exact type for each tensor"
            )
        packed = self.pack(codes.reshape(-1, self.block))
        scales = np.broadcast_to(np.float16(scale), (rows, width // self.block)).reshape(-1, 1).copy().view(np.uint8)
        parts = [scales, packed] if self.scale_first else [packed, scales]
        return np.ascontiguousarray(np.concatenate(parts, axis=1).reshape(rows, -1))

    def decode(self, data: Bytes) -> tuple[Codes, NDArray[np.float16]]:
        """Return codes `[out, in]` and the scales of all blocks `[out, in / block]` from bytes `[out, row_bytes]`."""
        blocks = data.reshape(-1, self.block_bytes)
        raw_scale, packed = (blocks[:, :2], blocks[:, 2:]) if self.scale_first else (blocks[:, -2:], blocks[:, :-2])
        scales = np.ascontiguousarray(raw_scale).view(np.float16)
        return self.unpack(packed).reshape(len(data), -1), scales.reshape(len(data), -1)


def f16_scales(scale: NDArray[np.float32], tensor: str) -> NDArray[np.float16]:
    """Round scales to f16.

    Raises:
        UserError: if one leaves f16's normal range, where rounding would no longer be harmless.
    """
    with np.errstate(over="ignore"):
        rounded: NDArray[np.float16] = scale.astype(np.float16)
    # A scale of NaN is none either.
    if not np.all((rounded >= SMALLEST_NORMAL_F16) & (rounded < np.inf)):
        worst = scale[~((rounded >= SMALLEST_NORMAL_F16) & (rounded < np.inf))].flat[0]
        raise UserError(f"{tensor} has scale {worst:.3g}, which f16 cannot hold: rescale the model's weights")
    return rounded


def f16_scale(scale: float, tensor: str) -> np.float16:
    """Round one scale to f16 as `f16_scales` does."""
    rounded: np.float16 = f16_scales(np.array([scale], np.float32), tensor)[0]
    return rounded


# ------------------------------------------------------------------------------------------------------------- I2_S

I2_S = 36
I2_S_BLOCK, I2_S_TAIL = 128, 32


def encode_i2_s(codes: Codes, scale: np.float32) -> Bytes:
    """Return a matrix as I2_S: bitnet.cpp's type of 2 bits a weight and one float32 scale a tensor. Not run in bitnet.cpp.

    128 weights in 32 bytes: byte j holds w[j] in bits 7-6, w[j + 32] in 5-4, w[j + 64] in 3-2 and w[j + 96] in 1-0, as code + 1.
    Behind the n / 4 code bytes are 32 more, of which the first four hold the scale and the rest is 0.

    Args:
        codes: int8 `[out, in]` in {-1, 0, 1}.
        scale: multiplies them.

    Returns:
        uint8 `[n / 4 + 32]`.

    Raises:
        UserError: if the row width is not a multiple of 128. bitnet.cpp does not check this and computes garbage.
    """
    if codes.shape[1] % I2_S_BLOCK:
        raise UserError(f"I2_S needs rows that are multiples of {I2_S_BLOCK}, not {codes.shape[1]}: use --type auto")
    planes = (codes + 1).astype(np.uint8).reshape(-1, 4, 32)
    packed = planes[:, 0] << 6 | planes[:, 1] << 4 | planes[:, 2] << 2 | planes[:, 3]
    tail = np.zeros(I2_S_TAIL, np.uint8)
    tail[:4] = np.array([scale], "<f4").view(np.uint8)
    return np.concatenate([packed.reshape(-1), tail])


def decode_i2_s(data: Bytes, shape: tuple[int, ...]) -> tuple[Codes, np.float32]:
    """Return codes of a shape and the scale from what `encode_i2_s` returns; the bit pair 3 becomes 2, as in the other types."""
    packed = data[:-I2_S_TAIL].reshape(-1, 32)
    planes = np.stack([packed >> shift & 3 for shift in (6, 4, 2, 0)], axis=1)
    (scale,) = np.ascontiguousarray(data[-I2_S_TAIL : -I2_S_TAIL + 4]).view("<f4")
    return (planes.reshape(shape).astype(np.int8) - 1).astype(np.int8), np.float32(scale)


# ------------------------------------------------------------------------------------------------------- block types


def _pack_q2_0(codes: Codes) -> Bytes:
    quads = (codes + 1).astype(np.uint8).reshape(len(codes), 16, 4)
    packed = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
    return packed.astype(np.uint8)


def _unpack_q2_0(packed: Bytes) -> Codes:
    quads = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return (quads.reshape(len(packed), 64).astype(np.int8) - 1).astype(np.int8)


def _pack_tq2_0(codes: Codes) -> Bytes:
    planes = (codes + 1).astype(np.uint8).reshape(len(codes), 2, 4, 32)
    packed = planes[:, :, 0] | planes[:, :, 1] << 2 | planes[:, :, 2] << 4 | planes[:, :, 3] << 6
    return packed.reshape(len(codes), 64).astype(np.uint8)


def _unpack_tq2_0(packed: Bytes) -> Codes:
    groups = packed.reshape(len(packed), 2, 32)
    planes = np.stack([groups >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    return (planes.reshape(len(packed), 256).astype(np.int8) - 1).astype(np.int8)


# TQ1_0 cuts a block into parts of (first weight, trits a byte, bytes): base-3 digits, most significant first, scaled to 0..255.
_TQ1_PARTS = ((0, 5, 32), (160, 5, 16), (240, 4, 4))
_POWERS = (81, 27, 9, 3, 1)


def _pack_tq1_0(codes: Codes) -> Bytes:
    trits = (codes + 1).astype(np.uint16)
    parts = []
    for start, digits, count in _TQ1_PARTS:
        columns = trits[:, start : start + digits * count].reshape(len(codes), digits, count)
        value = np.tensordot(columns, np.array(_POWERS[:digits], np.uint16), axes=(1, 0))
        parts.append(((value * 256 + 242) // 243).astype(np.uint8))
    return np.concatenate(parts, axis=1)


def _unpack_tq1_0(packed: Bytes) -> Codes:
    columns, offset = [], 0
    for _, digits, count in _TQ1_PARTS:
        part = packed[:, offset : offset + count]
        offset += count
        for n in range(digits):
            shifted = (part.astype(np.uint16) * 3**n).astype(np.uint8)
            columns.append((shifted.astype(np.uint16) * 3 >> 8).astype(np.int8) - 1)
    codes: Codes = np.concatenate(columns, axis=1).astype(np.int8)
    return codes


TYPES: dict[str, TernaryType] = {
    "tq1_0": TernaryType("tq1_0", 34, 256, 54, _pack_tq1_0, _unpack_tq1_0, scale_first=False),
    "tq2_0": TernaryType("tq2_0", 35, 256, 66, _pack_tq2_0, _unpack_tq2_0, scale_first=False),
    "q2_0": TernaryType("q2_0", 42, 64, 18, _pack_q2_0, _unpack_q2_0, scale_first=True),
}
BY_ID = {kind.ggml_id: kind for kind in TYPES.values()}
F32, F16, BF16 = 0, 1, 30
MATRIX_TYPES = ("f16", "bf16", *TYPES, "i2_s")
"""What a quantised matrix can be, by name."""


def matrix_block(name: str) -> int:
    """Return what a row of a matrix of this type must be a multiple of."""
    return I2_S_BLOCK if name == "i2_s" else TYPES[name].block if name in TYPES else 1


def choose_type(requested: str, width: int, tensor: str, blocks: tuple[int, ...] = (256, 64)) -> str:
    """Return the type of one quantised matrix: what was asked for, or for "auto" the exact type for its width.

    Args:
        requested: "auto" or one of `MATRIX_TYPES`.
        width: weights a row.
        tensor: its name.
        blocks: which block sizes "auto" may take: 256 (TQ2_0), 64 (Q2_0).

    Raises:
        UserError: for an unknown type, or a width that the type cannot have.
    """
    if requested == "auto":
        fitting = (name for name in ("tq2_0", "q2_0") if TYPES[name].block in blocks and width % TYPES[name].block == 0)
        requested = next(fitting, "f16")
    if requested not in MATRIX_TYPES:
        raise UserError(f"unknown GGUF type {requested!r}: choose auto, {', '.join(MATRIX_TYPES)}")
    if width % matrix_block(requested):
        raise UserError(
            f"{tensor} has rows of {width}, but {requested.upper()} needs a multiple of {matrix_block(requested)}: "
            "use --type auto, which picks an exact type for each tensor"
        )
    return requested
