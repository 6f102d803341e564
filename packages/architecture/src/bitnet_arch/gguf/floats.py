"""GGUF types of tensors that stay float (embeddings and head), as pure functions on numpy arrays, and the size of every type.

What each costs as the embedding and head of SmolLM2-135M (a 4-bit copy, dequantised) is in docs/experiments.md: Q6_K 0.9% of
perplexity, Q4_1 6.4%. The 4-bit type on offer is Q4_1, because it takes every row that divides by 32.
"""

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from bitnet_arch.errors import UserError
from bitnet_arch.gguf.types import BF16, BY_ID, F16, F32, I2_S, I2_S_BLOCK, I2_S_TAIL, TYPES

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

Q4_1, Q8_0, Q6_K = 3, 8, 14
PLAIN: dict[int, type[np.floating]] = {F32: np.float32, F16: np.float16}
EMBEDDING_TYPES: dict[str, int] = {"f16": F16, "bf16": BF16, "q8_0": Q8_0, "q6_k": Q6_K, "q4_1": Q4_1}
"""What embeddings and head can be."""

_CHUNK = 1 << 20
_Q6_SCALES = 17

SIZES: dict[int, tuple[int, int]] = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
SIZES |= {kind.ggml_id: (kind.block, kind.block_bytes) for kind in TYPES.values()}
"""Maps a type's number to (weights a block, bytes a block)."""

TYPE_NAMES = {int(kind): kind.name.lower() for kind in gguf.GGMLQuantizationType}
TYPE_NAMES |= {kind.ggml_id: kind.name for kind in TYPES.values()} | {I2_S: "i2_s"}
"""Maps a type's number to its name, in small letters."""


def tensor_bytes(ggml_id: int, shape: tuple[int, ...]) -> int | None:
    """Return how many bytes a tensor takes in a file, None for an unknown type or a row width that it cannot have."""
    elements = 1
    for size in shape:
        elements *= size
    if ggml_id == I2_S:
        return None if shape[-1] % I2_S_BLOCK else elements // 4 + I2_S_TAIL
    block, block_bytes = SIZES.get(ggml_id, (0, 0))
    return None if not block or shape[-1] % block else elements // block * block_bytes


def encode_float(values: Floats, ggml_id: int) -> NDArray[Any]:
    """Return a matrix `[rows, columns]` or a vector as a type of `EMBEDDING_TYPES` or F32 holds it.

    Returns:
        Floats of the same shape for F32 and F16, else bytes `[rows, row_bytes]`.

    Raises:
        UserError: if a row is no multiple of the type's block.
    """
    if ggml_id in PLAIN:
        with np.errstate(over="ignore"):
            plain: NDArray[Any] = values.astype(PLAIN[ggml_id])
        return plain
    block, block_bytes = SIZES[ggml_id]
    rows, columns = values.shape
    if columns % block:
        raise UserError(
            f"{TYPE_NAMES[ggml_id].upper()} needs rows that are multiples of {block}, not {columns}: choose f16 or q8_0"
        )
    encoded = np.empty((rows, columns // block * block_bytes), np.uint8)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        blocks = np.ascontiguousarray(values[start : start + step], np.float32).reshape(-1, block)
        encoded[start : start + step] = _ENCODERS[ggml_id](blocks).reshape(-1, encoded.shape[1])
    return encoded


def decode_float(data: Bytes, ggml_id: int, shape: tuple[int, ...]) -> Floats:
    """Return float32 of a shape from a tensor's bytes `[rows, row_bytes]`: any type that gguf-py can dequantise.

    Raises:
        UserError: if it cannot.
    """
    if ggml_id in PLAIN:
        plain: Floats = np.ascontiguousarray(data).view(PLAIN[ggml_id]).astype(np.float32).reshape(shape)
        return plain
    try:
        with np.errstate(all="ignore"):
            decoded: Floats = gguf.quants.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType(ggml_id))
    except (NotImplementedError, ValueError):
        raise UserError(f"tensors of type {TYPE_NAMES.get(ggml_id, ggml_id)} cannot be dequantised") from None
    return decoded.reshape(shape)


def round_bf16(values: Floats) -> Floats:
    """Return float32 values rounded to bfloat16, half to even."""
    return (_bf16_bits(values).astype(np.uint32) << 16).view(np.float32)


def bf16_bytes(values: Floats) -> Bytes:
    """Return the bytes `[rows, 2 · columns]` of a float32 matrix in bfloat16."""
    return np.ascontiguousarray(_bf16_bits(values)).view(np.uint8)


def _bf16_bits(values: Floats) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1)
    return (np.where(np.isnan(values), bits | 1 << 22, rounded) >> 16).astype(np.uint16)


def _half_bytes(values: Floats) -> Bytes:
    return np.ascontiguousarray(values.astype("<f2")).view(np.uint8)


def _reciprocal(values: Floats) -> Floats:
    return np.divide(1.0, values, out=np.zeros_like(values), where=values != 0)


def _encode_q8_0(blocks: Floats) -> Bytes:
    """One f16 scale for 32 codes of 8 bits: ggml's `quantize_row_q8_0_ref`, which rounds half away from zero."""
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    ratio = blocks * _reciprocal(scale)
    codes = (np.sign(ratio) * np.floor(np.abs(ratio) + np.float32(0.5))).astype(np.int8)
    return np.concatenate([_half_bytes(scale), codes.view(np.uint8)], axis=1)


def _encode_q4_1(blocks: Floats) -> Bytes:
    """An f16 scale and an f16 minimum for 32 codes of 4 bits; byte j holds weights j and j + 16.

    Deviation from ggml's reference: codes are chosen for the scale and minimum as they are stored, in f16. Searching for a better
    pair lowers the squared error by a fifth and left the NLL where it was (2.7951 in the table above).
    """
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    scale, minimum = ((high - low) / 15).astype(np.float16), low.astype(np.float16)
    codes = np.rint((blocks - minimum.astype(np.float32)) * _reciprocal(scale.astype(np.float32))).clip(0, 15).astype(np.uint8)
    return np.concatenate([scale.view(np.uint8), minimum.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], axis=1)


def _encode_q6_k(blocks: Floats) -> Bytes:
    """256 codes of 6 bits: 16 parts of 16, each with an 8-bit scale, times one f16.

    A part's scale is, of some around its largest magnitude / 32, the one with the least squared error (ggml's reference searches in
    the same way, with other weights). Layout: 128 bytes of low halves, 64 of high pairs, 16 scales, the f16.
    """
    parts = blocks.reshape(-1, 16)
    index = np.abs(parts).argmax(axis=1, keepdims=True)
    extreme = np.take_along_axis(parts, index, axis=1)
    best, least = np.zeros_like(extreme), np.full_like(extreme, np.inf)
    for step in range(_Q6_SCALES):
        # The extreme weight becomes a code around -32, the end of the range that has one level more.
        scale = extreme / np.float32(-32 + 0.25 * (step - _Q6_SCALES // 2))
        codes = np.rint(parts * _reciprocal(scale)).clip(-32, 31)
        squares = (codes * codes).sum(axis=1, keepdims=True)
        fitted = (parts * codes).sum(axis=1, keepdims=True) * _reciprocal(squares)
        error = ((parts - fitted * codes) ** 2).sum(axis=1, keepdims=True)
        best, least = np.where(error < least, fitted, best), np.minimum(error, least)
    scales = best.reshape(-1, 16)
    largest = np.take_along_axis(scales, np.abs(scales).argmax(axis=1, keepdims=True), axis=1)
    whole = (largest / np.float32(-128)).astype(np.float16)
    part_codes = np.rint(scales * _reciprocal(whole.astype(np.float32))).clip(-128, 127).astype(np.int8)
    steps = (part_codes * whole.astype(np.float32)).reshape(-1, 1)
    codes = (np.rint(parts * _reciprocal(steps)).clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.concatenate([codes[:, :, 0] & 15 | codes[:, :, 2] << 4, codes[:, :, 1] & 15 | codes[:, :, 3] << 4], axis=2)
    high = codes[:, :, 0] >> 4 | codes[:, :, 1] >> 4 << 2 | codes[:, :, 2] >> 4 << 4 | codes[:, :, 3] >> 4 << 6
    count = len(codes)
    encoded = [low.reshape(count, 128), high.reshape(count, 64), part_codes.view(np.uint8), whole.view(np.uint8)]
    joined: Bytes = np.concatenate(encoded, axis=1)
    return joined


_ENCODERS: dict[int, Callable[[Floats], Bytes]] = {BF16: bf16_bytes, Q8_0: _encode_q8_0, Q6_K: _encode_q6_k, Q4_1: _encode_q4_1}

assert not set(_ENCODERS) & set(BY_ID)
