"""GGUF tensor types as pure functions on numpy arrays.

A ternary type stores codes in blocks along a row, each with the tensor's one scale in f16. The codes are made by absmean before
packing: the packers of other tools take a block's absolute maximum as its scale, which turns a float matrix into garbage.
Layouts: ggml's `ggml-common.h` and `ggml-quants.c`.
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
    """One ternary block type.

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

    def encode(self, codes: Codes, scale: np.float16) -> Bytes:
        """Return the bytes `[out, row_bytes]` of int8 codes `[out, in]`.

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
        scales = np.full((len(packed), 1), scale, np.float16).view(np.uint8)
        parts = [scales, packed] if self.scale_first else [packed, scales]
        return np.ascontiguousarray(np.concatenate(parts, axis=1).reshape(rows, -1))

    def decode(self, data: Bytes) -> tuple[Codes, NDArray[np.float16]]:
        """Return codes `[out, in]` and the scales of all blocks `[out, in / block]` from bytes `[out, row_bytes]`."""
        blocks = data.reshape(-1, self.block_bytes)
        raw_scale, packed = (blocks[:, :2], blocks[:, 2:]) if self.scale_first else (blocks[:, -2:], blocks[:, :-2])
        scales = np.ascontiguousarray(raw_scale).view(np.float16)
        return self.unpack(packed).reshape(len(data), -1), scales.reshape(len(data), -1)


def f16_scale(scale: float, tensor: str) -> np.float16:
    """Round a scale to f16.

    Raises:
        UserError: if it leaves f16's normal range, where rounding would no longer be harmless.
    """
    rounded = np.float16(scale)
    if not SMALLEST_NORMAL_F16 <= float(rounded) < np.inf:
        raise UserError(f"{tensor} has scale {scale:.3g}, which f16 cannot hold: rescale the model's weights")
    return rounded


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
F32, F16 = 0, 1
PLAIN: dict[int, type[np.floating]] = {F32: np.float32, F16: np.float16}
BY_ID = {kind.ggml_id: kind for kind in TYPES.values()}


def choose_type(requested: str, width: int, tensor: str) -> str:
    """Return the type of one quantised matrix: what was asked for, or for "auto" the exact type for its width.

    Raises:
        UserError: for an unknown type, or a width that the type cannot have.
    """
    if requested == "auto":
        requested = next((name for name in ("tq2_0", "q2_0") if width % TYPES[name].block == 0), "f16")
    if requested not in ("f16", *TYPES):
        raise UserError(f"unknown GGUF type {requested!r}: choose auto, f16, {', '.join(TYPES)}")
    if requested != "f16" and width % TYPES[requested].block:
        raise UserError(
            f"{tensor} has rows of {width}, but {requested.upper()} needs a multiple of {TYPES[requested].block}: "
            "use --type auto, which picks an exact type for each tensor"
        )
    return requested
